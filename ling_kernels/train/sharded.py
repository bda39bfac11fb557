"""Parameters that FSDP2 has sharded, as 8-bit AdamW sees them: DTensors, of each of which a GPU has some rows.

State of such a parameter [N, ...] is sharded alike, codes [N, ...] and scales [N, elements of a row / 256], so that no
block of 256 lies in two rows: whatever GPUs there are, the blocks are those of the whole parameter, and a state that
torch.distributed.checkpoint has saved goes to another number of GPUs.
"""

import torch
from torch import Tensor

from ..op import expect
from ..ops.adamw_8bit import BLOCK, adamw_8bit_state


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """The part that is on this GPU, in the same memory; of another tensor, it itself."""
    return t.to_local() if is_sharded(t) else t


def moments_of(p: Tensor) -> dict[str, Tensor]:
    """State of adamw_8bit for a matrix, by name. Raises ValueError for a sharded one whose rows are no whole blocks."""
    (moments,) = adamw_8bit_state([local(p)])
    if not is_sharded(p):
        return moments._asdict()
    from torch.distributed.tensor import DTensor  # only who has imported it has such a parameter

    row = p.numel() // len(p)
    whole_rows = all(placement.is_replicate() or placement.is_shard(0) for placement in p.placements)
    expect(whole_rows and row % BLOCK == 0, f"parameters sharded by rows of a multiple of {BLOCK} elements", p)

    def sharded(t: Tensor, shape: torch.Size) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        here = t.view(len(local(p)), *shape[1:])
        return DTensor.from_local(here, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)

    scales = torch.Size((len(p), row // BLOCK))
    return {name: sharded(t, scales if "scale" in name else p.shape) for name, t in moments._asdict().items()}


def place(p: Tensor) -> int:
    """Which of its shards a GPU has: the same in GPUs that have the same one."""
    number = 0
    if is_sharded(p):
        for dim, placement in enumerate(p.placements):
            if placement.is_shard():
                number = number * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
    return number
