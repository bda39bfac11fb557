"""The exchange of rows with their experts over torch's symmetric memory, for GPUs that NVLink connects.

GPUs read each other's memory in one op, which takes its sizes from the device: the host never waits. So every buffer
has the size of the worst case, in which all tokens choose as many experts of one rank as they can:

    rows = ranks x tokens x min(topk, experts / ranks),   rows x (3 buffers + what the experts keep)

The op is torch.ops.symm_mem.all_to_all_vdev, on CUDA with NVSHMEM alone. Its barrier stands at its beginning: a rank
may still read another's buffer when that one goes on. Hence sources alternate between two buffers: the next call's
barrier says that all have left the one before. All that is private to torch is in `Symmetric`. Not run on a GPU.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from ..errors import InputError
from ..nn import MoE
from ..op import first_derivative_only
from .exchange import AllToAll


def symmetric(
    group: dist.ProcessGroup, experts: int, topk: int, tokens: int, device: torch.device
) -> Callable[[MoE], AllToAll]:
    """For `shard_experts_(model, group, symmetric(group, ...))`: the exchanges of all layers, over the same buffers.

    experts and topk are the model's; tokens: the most that a rank has in a forward, the same number on every rank.
    Raises InputError where this torch has no NVSHMEM.
    """
    expect_nvshmem()
    n = dist.get_world_size(group)
    memory = Symmetric(group, n * tokens * min(topk, experts // n), device)
    return lambda moe: SymmetricAllToAll(moe, group, memory)


def expect_nvshmem() -> None:
    if not symm_mem.is_nvshmem_available():
        raise InputError("an exchange over symmetric memory needs CUDA and NVSHMEM, which this torch does not find")


class SymmetricAllToAll(AllToAll):
    """As `AllToAll`, with its order of rows; rows past those received are undefined and have no expert."""

    def __init__(self, moe: MoE, group: dist.ProcessGroup, memory: "Symmetric"):
        super().__init__(moe, group)
        self.memory = memory

    def received(self, experts: Tensor, counts: Tensor):
        theirs = torch.empty_like(counts).view(self.ep, -1)
        dist.all_to_all_single(theirs, counts.view(self.ep, -1), group=self.group)
        ends = theirs.flatten().cumsum(0)
        rows = torch.arange(self.memory.rows, device=counts.device)
        owners = torch.searchsorted(ends, rows, right=True) % theirs.shape[1]
        owners = torch.where(rows < ends[-1], owners, -1).int()
        return owners[:, None], theirs.sum(0).int(), (counts.view(self.ep, -1).sum(1), theirs.sum(1))

    def send(self, rows: Tensor, sizes) -> Tensor:
        return SymmetricSend.apply(rows, *sizes, self.memory)


class SymmetricSend(torch.autograd.Function):
    """Rows in order of rank, `to` [ranks] of them -> all ranks' rows for this one, `from_` of them, in a tensor of the
    buffer's rows; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, to: Tensor, from_: Tensor, memory: "Symmetric") -> Tensor:
        ctx.save_for_backward(from_)
        ctx.memory, ctx.length = memory, len(rows)
        return memory.exchange(rows, to)

    @staticmethod
    @first_derivative_only
    def backward(ctx, gradient: Tensor):
        return ctx.memory.exchange(gradient, ctx.saved_tensors[0])[: ctx.length], None, None, None


class Symmetric:
    """Buffers of `rows` rows for each width and type that is sent. All ranks of the group make them together."""

    def __init__(self, group: dist.ProcessGroup, rows: int, device: torch.device):
        symm_mem.set_backend("NVSHMEM")
        self.group, self.rows, self.device, self.turn = group, rows, device, 0
        self.splits = [self.made(dist.get_world_size(group), dtype=torch.int64) for _ in range(2)]
        self.received = self.made(2, dist.get_world_size(group), dtype=torch.int64)  # splits, offsets
        self.buffers: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def made(self, *shape: int, dtype: torch.dtype) -> Tensor:
        t = symm_mem.empty(*shape, dtype=dtype, device=self.device)
        symm_mem.rendezvous(t, self.group)
        return t

    def exchange(self, rows: Tensor, splits: Tensor) -> Tensor:
        """rows [R, H] in order of rank, splits [ranks] of them -> [self.rows, H], undefined past those received."""
        kind = rows.shape[1], rows.dtype
        if kind not in self.buffers:
            self.buffers[kind] = [self.made(self.rows, kind[0], dtype=kind[1]) for _ in range(3)]
        *sources, out = self.buffers[kind]
        self.turn = 1 - self.turn
        source, into = sources[self.turn], self.splits[self.turn]
        source[: len(rows)].copy_(rows)
        into.copy_(splits)
        torch.ops.symm_mem.all_to_all_vdev(source, out, into, self.received, self.group.group_name)
        return out.clone()
