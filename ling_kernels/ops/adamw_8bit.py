"""AdamW with moments in 8 bits a value, in the format of bitsandbytes (arXiv 2110.02861).

A block of 256 values has one scale, its largest absolute value, and one code per value: the index of the nearest of 256
numbers in [-1, 1] (m) or [0, 1] (v), half as many in each decade towards 0, see `dynamic_map`. A v above 0 never gets
the code of 0: with m beside it, the update would be m / eps. The update is that of torch.optim.AdamW:
m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
The same pass over p can also round it stochastically to bf16 (up with a probability equal to the discarded fraction)
and requantise it to FP8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import E4M3, expect, op, upcast, use_reference
from .quantize import BLOCK as TILE
from .quantize import quantize_weight
from .triton_fp8 import fp8_round, fp8_scale
from .triton_import import tl, triton

BLOCK = 256
CHUNK = 1 << 20  # elements that the reference converts to fp32 at a time
MASK = 0xFFFFFFFF
TINY = torch.finfo(torch.float32).tiny  # divides the values of a block of zeros


class Moments(NamedTuple):
    """The moments of one parameter with n elements; a moment is map[code] * scale of its block. Without scales, m and v
    are the moments themselves, in fp32."""

    m: Tensor  # [n] uint8, or fp32
    m_scale: Tensor | None  # [ceil(n / 256)] fp32
    v: Tensor  # [n] uint8, or fp32
    v_scale: Tensor | None  # [ceil(n / 256)] fp32


def adamw_8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Moments],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | Tensor | None = None,
    fp8: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    pow2: bool = False,
) -> None:
    """AdamW step number `step` (from 1 on), in place in params and in their state: that of `adamw_8bit_state`, or
    Moments(m, None, v, None) with fp32 moments.

    Arithmetic in fp32, with the new moments before they are rounded to 8 bits. params are contiguous, fp32 or bf16;
    grads have their shapes. step may be a tensor [len(params)] on the device. grad_scale and found_inf are scalars on
    the device, as in torch's fused optimizers: grads are divided by grad_scale, and nothing changes unless found_inf is
    0. With a seed, bf16 params are rounded stochastically, equally for an equal seed, index in params, step and
    element; a tensor [len(params)] int64 on the device has a seed for each. Without a seed they are rounded to nearest.
    fp8 has for each parameter [(E,) N, K] None or the tensors of quantize_weight(p, pow2), which are rewritten, in the
    same pass if K % 256 == 0. Does not sync with the host. Raises ValueError where grads, state or fp8 do not fit
    params.
    """
    expect(len(params) == len(grads) == len(state) == len(fp8 or params), "as many grads, states and fp8 as params",
           len(params), len(grads), len(state), len(fp8 or params))  # fmt: skip
    first = isinstance(step, Tensor) or step >= 1
    expect(first and all(0 <= b < 1 for b in betas) and eps > 0, "step >= 1, betas in [0, 1), eps > 0",
           step, betas, eps)  # fmt: skip
    for p, g, s, copy in zip(params, grads, state, fp8 or [None] * len(params), strict=True):
        n, blocks = p.numel(), -(-p.numel() // BLOCK)
        expect(p.is_floating_point() and g.is_floating_point() and g.shape == p.shape, "grads as params", p, g)
        expect(p.is_contiguous(), "contiguous params", p)
        codes = s.m_scale is not None and s.v_scale is not None
        fits = s.m_scale.shape == s.v_scale.shape == (blocks,) if codes else s.m_scale is s.v_scale is None
        expect(fits and s.m.shape == s.v.shape == (n,)
               and s.m.dtype == s.v.dtype == (torch.uint8 if codes else torch.float32),
               "the state of adamw_8bit_state(params), or fp32 moments without scales", p, *s)  # fmt: skip
        expect(copy is None or copy[0].shape == p.shape and copy[0].dtype == E4M3, "fp8 as quantize_weight(p)", p, copy)
    if not params:
        return
    args = params, grads, state, lr, betas, eps, weight_decay, step, grad_scale, found_inf, seed, fp8, pow2
    if use_reference("adamw_8bit", *params):
        return adamw_8bit_ref(*args)
    tables = torch.stack([t for table in maps(params[0]) for t in (table, F.pad(midpoints(table), (0, 1)))])
    corrections, keys = by_parameter(params, betas, step, seed)
    for i, (p, g, s) in enumerate(zip(params, grads, state, strict=True)):
        copy = fp8[i] if fp8 else None
        fused = copy if p.shape[-1:].numel() % BLOCK == 0 else None
        key = keys[i] if seed is not None and p.dtype == torch.bfloat16 else None
        adamw_8bit_fwd(p.detach(), g.detach().contiguous(), *s, *(fused or (None, None)), tables, corrections[i], key,
                       grad_scale, found_inf, lr, *betas, eps, weight_decay, pow2)  # fmt: skip
        if copy is not fused:
            quantize_weight(p, pow2, copy)


def adamw_8bit_state(params: Sequence[Tensor]) -> list[Moments]:
    """Zero moments, on the device of each parameter."""

    def zeros(p: Tensor, code: int) -> tuple[Tensor, Tensor]:
        codes = torch.full((p.numel(),), code, dtype=torch.uint8, device=p.device)
        return codes, torch.zeros(-(-p.numel() // BLOCK), device=p.device)

    return [Moments(*zeros(p, 127), *zeros(p, 0)) for p in params]  # the codes of 0 in the two maps


@torch.no_grad()
def adamw_8bit_ref(params, grads, state, lr, betas, eps, weight_decay, step,
                   grad_scale=None, found_inf=None, seed=None, fp8=None, pow2=False):  # fmt: skip
    if not params:
        return
    b1, b2 = betas
    signed, unsigned = maps(params[0])
    corrections, keys = by_parameter(params, betas, step, seed)
    for i, (p, g, s) in enumerate(zip(params, grads, state, strict=True)):
        bias_m, bias_v = corrections[i].to(upcast(p.new_empty(0)).dtype)
        flat_p, flat_g = p.view(-1), g.reshape(-1)
        for start in range(0, p.numel(), CHUNK):
            now = slice(start, start + CHUNK)
            blocks = slice(start // BLOCK, (start + CHUNK) // BLOCK)
            m_scale, v_scale = (t if t is None else t[blocks] for t in (s.m_scale, s.v_scale))
            old = flat_p[now], s.m[now], m_scale, s.v[now], v_scale
            g, w = upcast(flat_g[now]), upcast(old[0])
            g = g if grad_scale is None else g / grad_scale
            m = b1 * dequantize_moment(*old[1:3], signed) + (1 - b1) * g
            v = b2 * dequantize_moment(*old[3:], unsigned) + (1 - b2) * g.square()
            root = (v / bias_v).double().sqrt().to(v.dtype)  # torch's fp32 root is an ulp off on some CPUs
            update = (m / bias_m) / (root + eps)
            w = w * (1 - lr * weight_decay) - lr * update
            if seed is not None and p.dtype == torch.bfloat16:
                w = round_stochastically(w, keys[i], start)
            m = (m, None) if m_scale is None else quantize_moment(m, signed)
            v = (v, None) if v_scale is None else quantize_moment(v, unsigned)
            new = w.to(p.dtype), *m, *v
            for a, b in zip(old, new, strict=True):
                if a is not None:
                    a.copy_(b if found_inf is None else torch.where(found_inf != 0, a, b.to(a.dtype)))
        if fp8 and fp8[i]:
            quantize_weight(p, pow2, fp8[i])


def by_parameter(params, betas, step, seed) -> tuple[Tensor, Tensor | None]:
    """1 - b1^t and 1 - b2^t [params, 2] fp32, and the keys of random bits [params] int64, on the device."""
    device = params[0].device
    if not isinstance(step, Tensor):
        step = torch.full((len(params),), step, dtype=torch.int64, device=device)
    corrections = torch.stack([1 - b ** step.double() for b in betas], 1).float()
    if seed is None:
        return corrections, None
    return corrections, rounding_keys(seeds(len(params), seed, device) if isinstance(seed, int) else seed, step)


def seeds(number: int, seed: int, device: torch.device) -> Tensor:
    """Seeds [number] int64 of that many parameters, derived from one seed."""
    return torch.arange(number, device=device) + (seed ^ seed >> 32)


def rounding_keys(seeds: Tensor, step: Tensor) -> Tensor:
    """The keys of the random bits of parameters with these seeds at these steps."""
    return hashed(hashed(seeds) ^ step.long())


def hashed(x: Tensor) -> Tensor:
    """A hash of the lower 32 bits of x, as int64: two rounds of multiply and xor-shift, a bijection."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def round_stochastically(x: Tensor, key: Tensor, first: int) -> Tensor:
    """x [n] fp32, elements `first` and on of a parameter, rounded to one of the two nearest bf16 numbers, as fp32.

    The expected value is x.
    """
    i = torch.arange(first, first + len(x), device=x.device)
    random = hashed((i + (i >> 32) * 0x9E3779B1) ^ key)
    bits = ((x.view(torch.int32).long() + (random & 0xFFFF)) >> 16 << 16).to(torch.int32)
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def dynamic_map(signed: bool, device: torch.device | None = None) -> Tensor:
    """The 256 numbers, ascending, fp32: 0, 1, and in decade i of seven 2^i numbers of each sign (signed) or 2^(i+1).

    The numbers of decade i are the centres of equal parts of [0.1, 1] * 10^(i - 6).
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, device=device)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], device=device)
    return torch.cat([positive, -positive, ends] if signed else [positive, ends]).sort().values


def maps(p: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of the first and of the second moment."""
    return dynamic_map(True, p.device), dynamic_map(False, p.device)


def midpoints(table: Tensor) -> Tensor:
    """[255]: the boundaries between the values that round to one number of the map and to the next."""
    return (table[:-1] + table[1:]) / 2


def quantize_moment(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """x [n] -> codes [n] uint8 and scale [ceil(n / 256)]."""
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    unit = blocks / scale.clamp(min=TINY)[:, None]
    codes = torch.bucketize(unit.float(), midpoints(table)).masked_fill(unit.isnan(), 0)  # the scale is NaN, too
    codes = torch.maximum(codes, (unit > 0).long())  # v > 0 never becomes 0, the code 0; m > 0 has codes above 126
    return codes.to(torch.uint8).flatten()[: len(x)], scale


def dequantize_moment(codes: Tensor, scale: Tensor | None, table: Tensor) -> Tensor:
    return codes if scale is None else table[codes.long()] * scale.repeat_interleave(BLOCK)[: len(codes)]


@op("p", "m", "m_scale", "v", "v_scale", "w_q", "w_scale")
def adamw_8bit_fwd(
    p: Tensor, g: Tensor, m: Tensor, m_scale: Tensor | None, v: Tensor, v_scale: Tensor | None, w_q: Tensor | None,
    w_scale: Tensor | None, tables: Tensor, corrections: Tensor, key: Tensor | None, grad_scale: Tensor | None,
    found_inf: Tensor | None, lr: float, b1: float, b2: float, eps: float, weight_decay: float, pow2: bool,
) -> None:  # fmt: skip
    """tables [4, 256]: map and midpoints of m, the same of v. corrections [2]. w_q needs p.shape[-1] % 256 == 0."""
    if not p.numel():
        return
    ld = 1 if w_q is None else p.shape[-1] // BLOCK
    grid = (triton.cdiv(p.numel(), BLOCK * TILE),)
    adamw_8bit_kernel[grid](
        p, g, m, m_scale, v, v_scale, w_q, w_scale, tables, corrections, key, grad_scale, found_inf, p.numel(), ld,
        lr, 1 - lr * weight_decay, b1, 1 - b1, b2, 1 - b2, eps, POW2=pow2, num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def adamw_8bit_kernel(
    p, g, m, m_scale, v, v_scale, w_q, w_scale, tables, corrections, key, grad_scale, found_inf, n, ld,
    lr, decay, b1, rest1, b2, rest2, eps, POW2: tl.constexpr,
):  # fmt: skip
    """A program has a column of 128 blocks of 256, in rows of ld blocks: 2 FP8 tiles of 128 x 128."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    bias_m, bias_v = tl.load(corrections), tl.load(corrections + 1)
    first = tl.program_id(0).to(tl.int64) // ld * 128 * ld + tl.program_id(0) % ld
    column = tl.arange(0, 256)[None, :]
    largest = tl.zeros([8, 256], tl.int32)
    for i in range(0, 128, 8):
        block = first + (i + tl.arange(0, 8)) * ld
        at = block[:, None] * 256 + column
        inside, exists = at < n, block * 256 < n
        w = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if grad_scale is not None:
            grad = tl.div_rn(grad, tl.load(grad_scale).to(tl.float32))
        new_m = b1 * load_moment(m, m_scale, at, block, inside, exists, tables) + rest1 * grad
        new_v = b2 * load_moment(v, v_scale, at, block, inside, exists, tables + 512) + rest2 * (grad * grad)
        update = tl.div_rn(tl.div_rn(new_m, bias_m), tl.sqrt_rn(tl.div_rn(new_v, bias_v)) + eps)
        w = w * decay - lr * update
        if key is not None:
            w = round_at_random(w, at, tl.load(key))
        w = w.to(p.dtype.element_ty)
        tl.store(p + at, w, mask=inside)
        largest = tl.maximum(largest, w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        store_moment(new_m, m, m_scale, at, block, inside, exists, tables + 256)
        store_moment(new_v, v, v_scale, at, block, inside, exists, tables + 768)

    # Reads p back, from the cache. The barrier is needed because threads read elements that other threads wrote.
    if w_q is not None:
        tl.debug_barrier()
        left = fp8_scale(tl.max(tl.where(column < 128, largest, 0)).to(tl.float32, bitcast=True), POW2)
        right = fp8_scale(tl.max(tl.where(column < 128, 0, largest)).to(tl.float32, bitcast=True), POW2)
        scale = tl.where(column < 128, left, right)
        for i in range(0, 128, 8):
            at = (first + (i + tl.arange(0, 8)) * ld)[:, None] * 256 + column
            tl.store(w_q + at, fp8_round(tl.load(p + at).to(tl.float32), scale, POW2))
        tile = tl.program_id(0).to(tl.int64) * 2
        tl.store(w_scale + tile, left)
        tl.store(w_scale + tile + 1, right)


@triton.jit
def load_moment(codes, scales, at, block, inside, exists, table):
    """A moment [8, 256] from its codes and scales; from itself without scales."""
    code = tl.load(codes + at, mask=inside, other=0)
    if scales is None:
        return code
    else:
        return tl.load(table + code.to(tl.int32)) * tl.load(scales + block, mask=exists, other=0.0)[:, None]


@triton.jit
def store_moment(x, codes, scales, at, block, inside, exists, midpoints):
    """x [8, 256] as codes and scales of blocks, midpoints [255] of the map; as it is without scales."""
    if scales is None:
        tl.store(codes + at, x, mask=inside)
    else:
        bits = tl.max(tl.where(inside, x, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # NaN > inf > every number
        scale = bits.to(tl.float32, bitcast=True)
        tiny: tl.constexpr = 1.1754943508222875e-38  # TINY
        unit = tl.div_rn(x, tl.where(scale < tiny, tiny, scale)[:, None])
        code = tl.zeros([8, 256], tl.int32)
        for i in tl.static_range(8):  # the number of smaller midpoints, by bisection
            half = 128 >> i
            code += tl.where(tl.load(midpoints + code + (half - 1)) < unit, half, 0)
        code = tl.maximum(code, (unit > 0).to(tl.int32))  # see quantize_moment
        tl.store(codes + at, code.to(tl.uint8), mask=inside)
        tl.store(scales + block, scale, mask=exists)


@triton.jit
def round_at_random(x, i, key):
    """`round_stochastically` of x, element i of a parameter."""
    h = (i.to(tl.uint32) + (i >> 32).to(tl.uint32) * 0x9E3779B1) ^ key.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    bits = x.to(tl.uint32, bitcast=True)
    up = ((bits + (h & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, up)
