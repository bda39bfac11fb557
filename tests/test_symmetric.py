"""The exchange over symmetric memory against the one by all-to-all. The op needs NVSHMEM: a stand-in with its schema
moves rows by gloo and leaves NaN in all rows that it does not write."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch.distributed.distributed_c10d import _resolve_process_group

from ling_kernels.errors import InputError
from ling_kernels.parallel.exchange import shard_experts_
from ling_kernels.parallel.symmetric import symmetric
from tests.ranks import run
from tests.test_expert_parallel import TOPK, WORLD, E, T, choices, layer, results_of


def test_two_processes_equal_one(tmp_path):
    run(tmp_path, [without_nvshmem, layers_agree], WORLD)


def test_the_schema_of_torch():
    schema = str(torch.ops.symm_mem.all_to_all_vdev.default._schema)
    assert schema == (
        "symm_mem::all_to_all_vdev(Tensor input, Tensor(a!) out, Tensor in_splits, Tensor(a!) out_splits_offsets,"
        " str group_name) -> ()"
    )


def without_nvshmem(rank, group):
    with pytest.raises(InputError, match="needs CUDA and NVSHMEM"):
        symmetric(group, E, TOPK, T, torch.device("cpu"))


def all_to_all_vdev(rows, out, in_splits, out_splits_offsets, group_name):
    assert all(id(t) in SHARED for t in (rows, out, in_splits, out_splits_offsets)), "not symmetric memory"
    assert rows.dtype == out.dtype and rows.stride(0) == out.stride(0) and in_splits.dtype == torch.int64
    group = _resolve_process_group(group_name)
    assert SHARED["last"] is not rows, "a source that others may read"
    SHARED["last"] = rows
    dist.all_to_all_single(out_splits_offsets[0], in_splits, group=group)
    to, from_ = in_splits.tolist(), out_splits_offsets[0].tolist()
    assert sum(from_) <= len(out)
    out.fill_(float("nan"))
    dist.all_to_all_single(out[: sum(from_)], rows[: sum(to)].contiguous(), from_, to, group=group)
    out_splits_offsets[1] = out_splits_offsets[0].cumsum(0) - out_splits_offsets[0]


SHARED = {"last": None}


@contextmanager
def nvshmem():
    """Symmetric memory on CPUs."""
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("all_to_all_vdev", all_to_all_vdev, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symm_mem, "is_nvshmem_available", lambda: True)
        patch.setattr(symm_mem, "set_backend", lambda name: None)
        patch.setattr(symm_mem, "empty", lambda *shape, dtype, device: torch.empty(*shape, dtype=dtype))
        patch.setattr(symm_mem, "rendezvous", lambda t, group: SHARED.update({id(t): t}))
        yield


def layers_agree(rank, group):
    with nvshmem():
        for fold, fp8 in ((False, False), (True, False), (True, True)):
            for kind in ("own", "one rank", "no tokens", "some left out"):
                moe = layer(fold, fp8, torch.bfloat16)
                shared = copy.deepcopy(moe)
                shard_experts_(moe, group)
                shard_experts_(shared, group, symmetric(group, E, TOPK, T, torch.device("cpu")))
                torch.manual_seed(100 + rank)
                x, dy = torch.randn(2, T, moe.router.weight.shape[1]).bfloat16()
                results = [
                    [*results_of(m, x, dy, choices(kind, rank)), m.experts.gate_up.grad, m.experts.down.grad]
                    for m in (moe, shared)
                ]
                for (i, want), got in zip(enumerate(results[0]), results[1], strict=True):
                    assert torch.equal(want, got), (fold, fp8, kind, i)
