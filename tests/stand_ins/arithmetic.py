"""What the stand-ins compute with, in fp32; none of it is ling_kernels'."""

import torch
from torch.nn import functional as F

E4M3 = torch.float8_e4m3fn


def wide(q, scale):
    for dim in (-2, -1):
        scale = scale.repeat_interleave(q.shape[dim] // scale.shape[dim], dim)
    return q.float() * scale


def fp8(x, rows=1):
    """Blocks of rows x 128 -> e4m3 as x and scales [M / rows, N / 128]."""
    blocks = x.float().unflatten(1, (-1, 128)).unflatten(0, (-1, rows))
    scale = blocks.abs().amax((1, 3)) / 448
    return (x.float() / wide(torch.ones_like(x), scale)).to(E4M3), scale


def norm(x, w, eps):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * w.float()).to(x.dtype)


def gate_up(x, weight=None):
    gate, up = x.float().chunk(2, -1)
    y = F.silu(gate) * up
    return (y if weight is None else y * weight.reshape(-1, 1)).to(x.dtype)
