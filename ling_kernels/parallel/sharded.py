"""Optimizer state of parameters that FSDP2 has sharded: DTensors, each GPU holding some rows.

State of a parameter [N, ...] is sharded like the parameter: codes [N, ...] and scales [N, elements of a row / 256]. So
no block of 256 elements spans two rows, the blocks do not depend on the number of GPUs, and a state that
torch.distributed.checkpoint has saved can be loaded on another number of GPUs.
"""

import torch
from torch import Tensor

from ..op import expect
from ..ops.adamw_8bit import BLOCK, adamw_8bit_state


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """This GPU's shard, sharing memory with t. A tensor that is not sharded is returned unchanged."""
    return t.to_local() if is_sharded(t) else t


def adamw_8bit_moments(p: Tensor, fp32: bool = False) -> dict[str, Tensor]:
    """Zero state of adamw_8bit for a matrix p, by name, sharded as p is. fp32: moments without codes and scales.

    Raises ValueError for codes of a p sharded along another dimension than 0, or with rows whose length
    is not a multiple of 256 elements.
    """
    if fp32:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name in ("m", "v")}
    (moments,) = adamw_8bit_state([local(p)])
    if not is_sharded(p):
        return moments._asdict()
    from torch.distributed.tensor import DTensor  # a sharded parameter exists only where this has been imported

    row = p.numel() // len(p)
    by_rows = all(placement.is_replicate() or placement.is_shard(0) for placement in p.placements)
    expect(by_rows and row % BLOCK == 0, f"parameters sharded by rows of a multiple of {BLOCK} elements", p)

    def sharded(t: Tensor, shape: torch.Size) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        shard = t.view(len(local(p)), *shape[1:])
        return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)

    scales = torch.Size((len(p), row // BLOCK))
    return {name: sharded(t, scales if "scale" in name else p.shape) for name, t in moments._asdict().items()}


def shard_index(p: Tensor) -> int:
    """Number of this GPU's shard of p; GPUs with equal shards have equal numbers. 0 where p is not sharded."""
    index = 0
    if is_sharded(p):
        for dim, placement in enumerate(p.placements):
            if placement.is_shard():
                index = index * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
    return index
