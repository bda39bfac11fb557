"""DeepGEMM's names for its FP8 products on Hopper, over our ops: `from ling_kernels.integrations import deep_gemm`.

Operands are pairs (e4m3 data, fp32 scales), results are written into d, as in DeepGEMM 2.6. Arguments that
are hints for its compiler or about Blackwell (compiled_dims, disable_ue8m0_cast, ensure_zero_padding, expected_m)
change no result and are accepted. Nothing is read on the host, and nothing is differentiable, as there. Row scales in
another layout than TMA loads are copied, which DeepGEMM does too. Misuse raises a ValueError in one line.
"""

import torch
from torch import Tensor

from ..errors import InputError
from ..op import expect, values_on_host
from ..ops.gemm_fp8 import gemm_fp8
from ..ops.grouped_gemm_fp8 import grouped_gemm_fp8, grouped_gemm_fp8_masked
from ..ops.grouped_wgrad import grouped_wgrad

Fp8 = tuple[Tensor, Tensor]
WEIGHT = (1, 128, 128)  # a has one scale per 1 x 128, b one per 128 x 128
ROWS = (1, 1, 128)  # both have one per 1 x 128


def fp8_gemm_nt(
    a: Fp8,
    b: Fp8,
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d [M, N] bf16 or fp32 = c + a b^T, for a [M, K] and b [N, K], K % 128 == 0.

    Scales are a's [M, K/128] and b's [N/128, K/128], N % 128 == 0, or with recipe (1, 1, 128) b's [N, K/128]. c may be
    d itself; another c is copied into d first.
    """
    recipe = chosen_recipe(recipe, recipe_a, recipe_b, WEIGHT, ROWS)
    expect_scales(b, 128 if recipe == WEIGHT else 1, a[0].ndim)
    start_from(c, d)
    gemm_fp8(*a, *b, out=d, accumulate=c is not None)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Fp8,
    b: Fp8,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """d [M, N] bf16: row m is a's times the weight grouped_layout[m] of b [E, N, K]^T.

    grouped_layout [M] int32: the rows of an expert lie together, experts ascend, and -1 is padding, whose rows of d are
    undefined. Groups need no alignment. With use_psum_layout grouped_layout is [E] int32, the end of each expert's
    rows, and an expert starts at the next multiple of 128 after the one before. The order is looked at on a CPU only.
    """
    chosen_recipe(recipe, recipe_a, recipe_b, WEIGHT)
    expect_scales(b, 128, 3)
    E, M = len(b[0]), len(a[0])
    shape = (E,) if use_psum_layout else (M,)
    expect(grouped_layout.shape == shape and grouped_layout.dtype == torch.int32, f"grouped_layout {list(shape)} int32",
           grouped_layout)  # fmt: skip
    if use_psum_layout:  # the gap before an expert's rows is computed with them
        offsets = torch.cat([grouped_layout.new_zeros(1), grouped_layout])
    else:
        offsets = offsets_of_rows(grouped_layout, E)
    grouped_gemm_fp8(*a, *b, offsets, out=d)


def m_grouped_fp8_gemm_nt_masked(
    a: Fp8,
    b: Fp8,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d [E, M, N] bf16 = a [E, M, K] b [E, N, K]^T, in the first masked_m[e] rows of expert e; others are undefined."""
    chosen_recipe(recipe, recipe_a, recipe_b, WEIGHT)
    expect_scales(b, 128, 3)
    grouped_gemm_fp8_masked(*a, *b, masked_m, out=d)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Fp8,
    b: Fp8,
    d: Tensor,
    ks_cpu: list[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] = ROWS,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """d [E, M, N] fp32 or bf16 = c + a_e b_e^T, the weight gradients of experts with ks_cpu[e] columns each.

    a and b are flat: the matrices [M, ks_cpu[e]] and [N, ks_cpu[e]] of the experts one after another; their scales are
    [M, K/128] and [N, K/128] for K = sum(ks_cpu), each a multiple of 128. grouped_layout [E] int32 is ks_cpu on the
    device. c may be d itself; another c is copied into d first, and None stands for zeros. The data of a and b are
    copied, since our op wants each as one matrix; with one expert that is a view.
    """
    if recipe != ROWS or use_psum_layout:
        raise InputError(f"k_grouped_fp8_gemm_nt_contiguous takes recipe {ROWS} and no psum layout, as on Hopper")
    expect(all(k >= 0 and k % 128 == 0 for k in ks_cpu), "ks_cpu of multiples of 128", ks_cpu)
    fits = grouped_layout.shape == (len(ks_cpu),) == d.shape[:1] and d.ndim == 3 and grouped_layout.dtype == torch.int32
    expect(fits, f"d [{len(ks_cpu)}, M, N] and grouped_layout [{len(ks_cpu)}] int32", d, grouped_layout)
    if values_on_host(grouped_layout):
        expect(grouped_layout.tolist() == list(ks_cpu), "grouped_layout equal to ks_cpu", grouped_layout.tolist())
    offsets = torch.cat([grouped_layout.new_zeros(1), grouped_layout.cumsum(0, dtype=torch.int32)])
    start_from(c, d)
    wide_a, wide_b = (one_matrix(flat, rows, ks_cpu) for flat, rows in ((a[0], d.shape[1]), (b[0], d.shape[2])))
    grouped_wgrad(wide_a, wide_b, offsets, d, c is not None, a[1], b[1], columns=True)


def chosen_recipe(recipe, recipe_a, recipe_b, *supported: tuple[int, int, int]) -> tuple[int, int, int]:
    """The granularity of the scales, (rows of a, rows of b, columns)."""
    if recipe is None and recipe_a is not None and recipe_b is not None and recipe_a[1] == recipe_b[1]:
        recipe = (recipe_a[0], recipe_b[0], recipe_a[1])
    elif recipe is None and recipe_a is recipe_b is None:
        recipe = WEIGHT
    if recipe is None or tuple(recipe) not in supported:
        given = f"recipe {recipe}, recipe_a {recipe_a}, recipe_b {recipe_b}"
        raise InputError(f"{given}: recipe is one of {', '.join(map(str, supported))}")
    return tuple(recipe)


def expect_scales(b: Fp8, rows: int, ndim: int) -> None:
    """Check that b [(E,) N, K] has the recipe's scales: one in fp32 for so many rows and 128 columns."""
    data, scale = b
    fits = data.ndim == ndim == scale.ndim and scale.shape[-2] * rows == data.shape[-2] and scale.dtype == torch.float32
    expect(fits, f"b {'[E, N, K]' if ndim == 3 else '[N, K]'} with an fp32 scale per {rows} x 128", data, scale)


def start_from(c: Tensor | None, d: Tensor) -> None:
    """Copy c into d, to which a product will be added."""
    expect(c is None or (c.shape == d.shape and c.dtype == d.dtype), "c of d's shape and dtype", c, d)
    if c is not None and (c.data_ptr() != d.data_ptr() or c.stride() != d.stride()):
        d.copy_(c)


def offsets_of_rows(experts: Tensor, E: int) -> Tensor:
    """experts [M] int32 ascending, with -1 for padding -> [E + 1] int32, on the device alone.

    Padding between two experts is computed with the one before it; padding after the last belongs to none.
    """
    row = torch.arange(len(experts), dtype=torch.int32, device=experts.device)
    routed = experts >= 0
    expert = experts.cummax(0).values.clamp(min=0)
    if values_on_host(experts):
        expect(
            bool((expert == experts)[routed].all() and (experts < E).all()), f"experts that ascend below {E}", experts
        )
    end = torch.where(routed, row + 1, 0).amax() if len(experts) else row.new_zeros(())
    of_expert = torch.arange(E + 1, dtype=torch.int32, device=experts.device)
    return torch.searchsorted(expert, of_expert, out_int32=True).minimum(end.int())


def one_matrix(flat: Tensor, rows: int, ks: list[int]) -> Tensor:
    """The matrices [rows, k] one after another in `flat`, as one [rows, sum(ks)]."""
    expect(flat.is_contiguous() and flat.numel() == rows * sum(ks), f"{rows} x {sum(ks)} contiguous elements", flat)
    parts = flat.view(-1).split([rows * k for k in ks])
    parts = [part.view(rows, k) for part, k in zip(parts, ks, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
