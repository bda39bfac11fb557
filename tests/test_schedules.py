"""Orders of a pipeline's work: torch's own, pinned; their text; what is refused; weight gradients that are deferred."""

import csv
from dataclasses import replace

import pytest
import torch
from torch.distributed.pipelining import schedules as torchs

from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.ops.deferred import deferring
from ling_kernels.parallel.deferred import DeferredLinear, defer_linear_
from ling_kernels.parallel.schedules import (
    SCHEDULES,
    V_SHAPED,
    check,
    is_split,
    parse_step,
    placement,
    read_csv,
    schedule_order,
    step_text,
    write_csv,
)
from tests.training import tiniest


def texts(order):
    return [" ".join(map(step_text, row)) for row in order]


def test_the_orders_are_torchs():
    """Two ranks, two stages each, four micro batches: another torch that orders them otherwise is noticed."""
    assert texts(schedule_order("Interleaved1F1B", 2, 4, 4)) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]
    assert texts(schedule_order("1F1B", 2, 2, 3)) == ["0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"]
    assert texts(schedule_order("GPipe", 2, 2, 2)) == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]
    assert any(len(step) == 2 for row in schedule_order("DualPipeV", 2, 4, 8) for step in row)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_order_is_complete(name):
    stages = 3 if name in ("1F1B", "GPipe") else 6
    order = schedule_order(name, 3, stages, 6)
    place = [0, 1, 2, 2, 1, 0] if name in V_SHAPED else [s % 3 for s in range(stages)]
    assert check(order, 3, stages, 6) == placement(name, 3, stages) == place
    assert is_split(order) == (name in ("InterleavedZeroBubble", *V_SHAPED))


def test_files_are_torchs(tmp_path):
    order = schedule_order("DualPipeV", 2, 4, 8)
    write_csv(order, tmp_path / "order.csv")
    assert read_csv(tmp_path / "order.csv") == order
    with open(tmp_path / "order.csv", newline="") as file:
        rows = [[str(torchs._Action.from_str(text)) for text in row] for row in csv.reader(file)]
    assert rows == [[*map(step_text, row)] for row in order]
    (tmp_path / "idle.csv").write_text("0F0,,0B0\n\n,1F0,1B0\n")
    assert texts(read_csv(tmp_path / "idle.csv"))[0] == "0F0 0B0"


@pytest.mark.parametrize("rows, message", [
    (["0F0 0B0"], "for 1 ranks, not 2"),
    (["0F0 0B0", "1F0"], "has F of stage 1 and micro batch 0"),
    (["0F0 0B0", ""], "has nothing of stage 1"),
    (["0F0 0B0", "1F0 1B0 1B0"], "1B0 is twice"),
    (["0F0 1B0", "1F0 0B0"], "or its stage on two ranks"),
    (["0F0 0B0", "1F0 1B0 2F0"], "2F0 in"),
    (["0F0 0B0", "1F1 1B1"], "1F1 in"),
    (["0F0 0B0", "1B0 1F0"], "stops before 0B0"),
    (["0F0 0I0 0B0 0W0", "1F0 1B0"], "has B, F, I, W of stage 0"),
])  # fmt: skip
def test_wrong_orders_are_one_line(rows, message):
    with pytest.raises(InputError, match=message):
        check([[parse_step(t) for t in row.split()] for row in rows], 2, 2, 1)


@pytest.mark.parametrize("name, ranks, stages, micro_batches, message", [
    ("1f1b", 2, 2, 4, "must be one of"), ("GPipe", 2, 4, 4, "needs one stage a rank"),
    ("LoopedBFS", 2, 3, 4, "each rank takes equally many"), ("ZBVZeroBubble", 2, 2, 4, "it needs two each"),
    ("Interleaved1F1B", 4, 8, 9, "multiple of the number of rounds"), ("DualPipeV", 2, 4, 3, "at least as many"),
])  # fmt: skip
def test_numbers_that_do_not_fit(name, ranks, stages, micro_batches, message):
    with pytest.raises(InputError, match=message):
        schedule_order(name, ranks, stages, micro_batches)


@pytest.mark.parametrize("text", ["F0", "0X0", "0F", "(0F0)OVERLAP_F_B", "(0F0;1F0)OVERLAP_F_B", "0F0x"])
def test_wrong_files(text, tmp_path):
    (tmp_path / "order.csv").write_text(text + "\n")
    with pytest.raises(InputError, match="is no action"):
        read_csv(tmp_path / "order.csv")
    with pytest.raises(InputError, match="missing.csv"):
        read_csv(tmp_path / "missing.csv")


@pytest.mark.parametrize("kind", ["fp32", "autocast", "fp8", "fp8 bf16 wgrad", "main_grad", "recompute", "MTP again"])
def test_deferred_weight_gradients_are_the_same(kind):
    """The backward leaves out the large matrices; run later, they arrive once, to the bit."""
    fp8 = kind.startswith(("fp8", "main"))
    sizes = dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, head_dim=64) if fp8 else {}
    config = replace(tiniest(), num_nextn_predict_layers=1, vocab_size=64, **sizes)
    model = Ling(config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    if fp8:
        replaced, left = to_fp8(model, wgrad="bf16" if "bf16" in kind else "fp8")
        assert replaced and not left
    if kind == "recompute":
        model.recompute_()
    if kind == "MTP again":
        model.recompute_(mtp_only=True)
        assert [layer.recompute for layer in (*model.layers, model.mtp[0].layer)] == [False] * len(model.layers) + [
            True
        ]
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))

    def backward():
        matrices = {}
        for name, p in model.named_parameters():
            p.grad = None
            if kind == "main_grad" and p.ndim > 1:
                p.main_grad = torch.zeros_like(p)
            if p.ndim > 1 and not any(part in name for part in ("word_embeddings", "lm_head", "router", "gate.weight")):
                matrices[name] = p
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            model(ids, labels=ids, logits=False).loss.backward()
        return matrices

    def gradients():
        return {n: [None if g is None else g.clone() for g in (p.grad, getattr(p, "main_grad", None))]
                for n, p in model.named_parameters()}  # fmt: skip

    backward()
    want = gradients()
    for layer in (*model.layers, *model.mtp):
        defer_linear_(layer)
    assert any(isinstance(m, DeferredLinear) for m in model.modules())
    later = []
    with deferring(later):
        matrices = backward()
        assert len(later) == len(matrices) > 4
        assert all(p.grad is None for p in matrices.values()) and model.norm.weight.grad is not None
        for gradient in reversed(later):
            gradient()
    got = gradients()
    for name, pair in want.items():
        for a, b in zip(pair, got[name], strict=True):
            assert (a is None) == (b is None), name
            assert a is None or torch.equal(a, b), name
