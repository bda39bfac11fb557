"""The functions that call other libraries, on stand-ins with those libraries' signatures: what is timed is what it is
said to be. No library is needed, nothing is timed."""

import pytest
import torch

from benchmarks import bench_ops, peers
from benchmarks.work import tensors
from tests import stand_ins as stand_ins_of_peers
from tests.cases import BF16, CASES, args_of

MORE = {  # where a Case's small shapes are none of a peer's
    "grad_norm": [dict(sizes=(1000, 70))],
    "moe": [dict(T=8, E=8, H=128, F=256, groups=4, group_topk=2, topk=4, Fs=128, fp8=fp8) for fp8 in (False, True)],
    "swiglu": [dict(S=9, F=256)],
}
OTHERS = [(op, name) for op, found in peers.PEERS.items() for name in found if peers.PACKAGES[name] != "torch"]


@pytest.fixture
def stand_ins(monkeypatch):
    stand_ins_of_peers.install(monkeypatch)
    return monkeypatch


def errors(op: str, name: str) -> dict:
    """Of the peer at each Case and shape that it takes."""
    found = {}
    for case in (c for c in CASES if c.op.__name__ == op):
        for shape in (*case.shapes[:-1], *MORE.get(op, ())):
            dtype = BF16 if BF16 in case.dtypes else case.dtypes[0]
            try:
                args = bench_ops.detached(tuple(args_of(case, shape, dtype)))
            except TypeError:  # another Case's
                continue
            if (
                not tensors(args)
                or not all(t.numel() for t in tensors(args))
                or sum(t.numel() for t in tensors(args)) > 1 << 21
            ):
                continue
            try:
                call, alike = peers.prepare(name, case, args)
            except NotImplementedError:
                continue
            assert not any(t.grad_fn for t in tensors(call())), "what is timed is the forward alone"
            call, alike = peers.prepare(name, case, args)
            found[case.name, str(shape)] = peers.error(call(), bench_ops.reference(case, args, None), alike)
    return found


@pytest.mark.parametrize("op, name", OTHERS, ids=lambda v: v.replace(" ", "-"))
def test_a_peer_is_called_with_what_it_expects(stand_ins, op, name):
    found = errors(op, name)
    assert found and max(found.values()) < 0.05, found


def test_a_layout_misread_is_no_rounding(stand_ins):
    """Gates and ups by turns, as only SonicMoE has them, given to vLLM; an order of arguments; a weight left out."""
    import vllm.model_executor.layers.fused_moe.fused_moe as theirs

    right = theirs.fused_experts
    stand_ins.setattr(theirs, "fused_experts", lambda x, w1, *others, **how: right(
        x, torch.cat([w1[:, ::2], w1[:, 1::2]], 1), *others, **how))  # fmt: skip
    with pytest.raises(ValueError, match="differs from the reference's by"):
        errors("moe", "vLLM's experts")
    import flashinfer

    stand_ins.setattr(flashinfer.norm, "rmsnorm", lambda x, w, eps: x)
    with pytest.raises(ValueError, match="differs"):
        errors("rms_norm", "FlashInfer")
    stand_ins.setattr(flashinfer.norm, "rmsnorm", lambda x, w, eps: x * torch.nan)
    with pytest.raises(ValueError, match="by nan"):
        errors("rms_norm", "FlashInfer")
