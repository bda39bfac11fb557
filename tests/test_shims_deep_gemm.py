"""DeepGEMM's names over our ops, against products of dequantised operands in fp64."""

import pytest
import torch

from ling_kernels import InputError, backend
from ling_kernels.integrations.deep_gemm import (
    fp8_gemm_nt,
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    offsets_of_rows,
)
from tests.cases import BF16, FP32, Rand

BACKENDS = ("torch", "triton", "cuda")


def random_codes(rand: Rand, *shape) -> torch.Tensor:
    return rand.data(*shape, dtype=FP32).mul_(100).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(rand: Rand, *shape) -> torch.Tensor:
    return rand.data(*shape, dtype=FP32).abs_().add_(0.1).contiguous()


def rows(rand: Rand, *shape):
    """e4m3 [..., K] and one scale per 1 x 128, row-major as DeepGEMM's cast returns them."""
    return random_codes(rand, *shape), scales(rand, *shape[:-1], shape[-1] // 128)


def weight(rand: Rand, *shape):
    *E, N, K = shape
    return random_codes(rand, *shape), scales(rand, *E, N // 128, K // 128)


def wide(operand) -> torch.Tensor:
    """Dequantised, fp64; a scale covers as many rows and columns as the shapes say."""
    data, scale = operand
    for dim in (-2, -1):
        scale = scale.repeat_interleave(data.shape[dim] // scale.shape[dim], dim)
    return data.double() * scale.double()


def close(got, want) -> None:
    assert torch.isfinite(got).all()
    limit = 2**-7 * want.abs() + 1e-5 * want.abs().max()  # one rounding to bf16, sums in fp32
    assert ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("by_rows", [False, True])
def test_gemm_adds_to_c(name, by_rows):
    rand = Rand(BF16)
    a, b = rows(rand, 37, 256), rows(rand, 128, 256) if by_rows else weight(rand, 128, 256)
    product = wide(a) @ wide(b).T
    recipe = dict(recipe=(1, 1, 128)) if by_rows else dict(recipe_a=(1, 128), recipe_b=(128, 128))
    d = torch.full((37, 128), torch.nan, dtype=BF16)
    c = rand.data(37, 128, dtype=FP32) * 1e5
    other, same = torch.full_like(c, torch.nan), c.clone()
    with backend.force(name):
        assert fp8_gemm_nt(a, b, d, **recipe, compiled_dims="mnk", disable_ue8m0_cast=True) is None
        fp8_gemm_nt(a, b, other, c, **recipe)
        fp8_gemm_nt(a, b, same, same, **recipe)
    close(d, product)
    close(other, c + product)
    assert torch.equal(other, same)


def grouped_rows(counts: list[int], alignment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepGEMM's two layouts of groups that start at multiples of the alignment: by row, and by ends."""
    ids, ends = [], []
    for e, count in enumerate(counts):
        ends.append(len(ids) + count)
        ids += [e] * count + [-1] * (-count % alignment)
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("alignment, psum", [(128, False), (128, True), (1, False), (5, False)])
def test_m_grouped_contiguous(name, alignment, psum):
    rand, counts = Rand(BF16), [3, 0, 130, 7, 0]
    ids, ends = grouped_rows(counts, alignment)
    if not psum:
        ids = torch.cat([torch.full((4,), -1), ids, torch.full((20,), -1)]).int()  # padding at both ends
    a, b = rows(rand, len(ids), 256), weight(rand, len(counts), 128, 256)
    a[1][ids < 0] = torch.nan
    d = torch.full((len(ids), 128), 7.0, dtype=BF16)
    with backend.force(name):
        m_grouped_fp8_gemm_nt_contiguous(a, b, d, ends if psum else ids, use_psum_layout=psum)
    owned = ids >= 0
    want = (wide(a)[owned, None] @ wide(b)[ids[owned].long()].mT)[:, 0]
    close(d[owned], want)


def test_padding_at_the_end_is_not_computed():
    ids = torch.tensor([-1, 0, 0, -1, 2, -1, -1], dtype=torch.int32)
    assert offsets_of_rows(ids, 4).tolist() == [0, 4, 4, 5, 5]
    assert offsets_of_rows(ids[:1], 2).tolist() == offsets_of_rows(ids[:0], 2).tolist() == [0, 0, 0]


def test_no_rows_and_all_padding():
    rand = Rand(BF16)
    b = weight(rand, 3, 128, 128)
    for ids in (torch.empty(0, dtype=torch.int32), torch.full((9,), -1, dtype=torch.int32)):
        a, d = rows(rand, len(ids), 128), torch.empty(len(ids), 128, dtype=BF16)
        m_grouped_fp8_gemm_nt_contiguous(a, b, d, ids)


@pytest.mark.parametrize("name", BACKENDS)
def test_m_grouped_masked(name):
    rand, counts = Rand(BF16), torch.tensor([3, 0, 16], dtype=torch.int32)
    a, b, d = rows(rand, 3, 16, 256), weight(rand, 3, 128, 256), torch.full((3, 16, 128), 7.0, dtype=BF16)
    owned = torch.arange(16) < counts[:, None]
    a[1][~owned] = torch.nan
    with backend.force(name):
        m_grouped_fp8_gemm_nt_masked(a, b, d, counts, expected_m=8)
    close(d[owned], (wide(a) @ wide(b).mT)[owned])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("ks", [[256, 0, 128], [128]])
def test_k_grouped(name, ks):
    """The flat operands of DeepGEMM: matrices [rows, k] one after another, scales [rows, K/128] transposed."""
    rand, M, N = Rand(BF16), 128, 256

    def operand(size):
        parts = [random_codes(rand, size, k) for k in ks]
        return torch.cat([p.flatten() for p in parts]), scales(rand, sum(ks) // 128, size).T, torch.cat(parts, 1)

    a, a_scale, wide_a = operand(M)
    b, b_scale, wide_b = operand(N)
    A, B = wide((wide_a, a_scale)), wide((wide_b, b_scale))
    c = rand.data(len(ks), M, N, dtype=FP32) * 1e5
    want = torch.stack([x @ y.T for x, y in zip(A.split(ks, 1), B.split(ks, 1), strict=True)])
    same, other, alone = c.clone(), torch.full_like(c, torch.nan), torch.full_like(c, torch.nan)
    layout = torch.tensor(ks, dtype=torch.int32)
    with backend.force(name):
        k_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), same, ks, layout, same)
        k_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), other, ks, layout, c)
        k_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), alone, ks, layout)
    close(same, c + want)
    assert torch.equal(same, other)
    close(alone, want)


def test_refused():
    rand = Rand(BF16)
    a, b, d = rows(rand, 8, 128), weight(rand, 128, 128), torch.empty(8, 128, dtype=BF16)
    with pytest.raises(InputError, match=r"recipe is one of \(1, 128, 128\), \(1, 1, 128\)"):
        fp8_gemm_nt(a, b, d, recipe=(1, 1, 32))
    with pytest.raises(InputError, match="recipe_a"):
        fp8_gemm_nt(a, b, d, recipe_a=(1, 128))
    with pytest.raises(ValueError, match="fp32 scale per 1 x 128"):
        fp8_gemm_nt(a, b, d, recipe=(1, 1, 128))
    with pytest.raises(ValueError, match="fp32 scale per 128 x 128"):  # packed UE8M0, as on Blackwell
        fp8_gemm_nt(a, (b[0], b[1].int()), d)
    with pytest.raises(ValueError, match="c of d's shape and dtype"):
        fp8_gemm_nt(a, b, d, d.float())
    grouped = weight(rand, 2, 128, 128)
    for ids in ([1, 0, 0, 0, 0, 0, 0, 0], [2] * 8):
        with pytest.raises(ValueError, match="experts that ascend below 2"):
            m_grouped_fp8_gemm_nt_contiguous(a, grouped, d, torch.tensor(ids, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"grouped_layout \[2\] int32"):
        m_grouped_fp8_gemm_nt_contiguous(a, grouped, d, torch.zeros(8, dtype=torch.int32), use_psum_layout=True)
    with pytest.raises(ValueError, match="counts between 0 and max_m"):
        m_grouped_fp8_gemm_nt_masked(rows(rand, 2, 4, 128), grouped, torch.empty(2, 4, 128, dtype=BF16),
                                     torch.tensor([1, 5], dtype=torch.int32), 4)  # fmt: skip
    flat = (torch.empty(128 * 128, dtype=torch.float8_e4m3fn), torch.ones(128, 1))
    layout, dw = torch.tensor([128], dtype=torch.int32), torch.zeros(1, 128, 128)
    for wrong, match in ((dict(use_psum_layout=True), "no psum layout"), (dict(ks_cpu=[64]), "multiples of 128")):
        with pytest.raises(ValueError, match=match):
            k_grouped_fp8_gemm_nt_contiguous(
                flat, flat, dw, **{"ks_cpu": [128], "grouped_layout": layout, "c": dw, **wrong}
            )
