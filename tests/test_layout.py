"""The plan of one GPU of many, against the plan of a single GPU and against bytes added up by hand."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ling_kernels.backend import force
from ling_kernels.model import Ling, LingConfig
from ling_kernels.parallel.layout import Layout
from ling_kernels.plan.ranks import Rank
from ling_kernels.plan.train import plan_training, rank_settings
from ling_kernels.train.__main__ import main
from ling_kernels.train.settings import Settings
from tests.test_fp8_training import WHOLE
from tests.training import one_line_error

FP8 = replace(Settings(), batch=4, micro_batch=2, seq_len=64, precision="fp8", master="bf16", optimizer="adamw8bit")
BF16 = replace(FP8, precision="bf16")


def planned(c=WHOLE, s=FP8, stage=0, worst_load=False, **layout):
    layout = Layout(**layout)
    return plan_training(
        c, rank_settings(layout, replace(s, batch=s.batch * layout.dp), c), Rank(layout, stage, worst_load)
    )


def parameters(c=WHOLE):
    """{name: (shape, bytes of an element, whether it is an expert's)} with bf16 masters."""
    with FakeTensorMode():
        named = [*Ling(c).named_parameters()]
    wide = lambda n, p: p.ndim < 2 or n.endswith("router.weight")  # noqa: E731
    return {n: (tuple(p.shape), 4 if wide(n, p) else 2, ".mlp.experts." in n) for n, p in named}


def elements(shape):
    return torch.Size(shape).numel()


@pytest.mark.parametrize("s, zeros", [(replace(FP8, fp8_weights="kept"), (0,)), (FP8, (2, 3))])
def test_gpus_without_sharding_hold_as_much_as_one(s, zeros):
    alone = plan_training(WHOLE, s)
    assert planned(s=s, dp=3) == alone
    assert all(planned(s=s, zero=zero) == alone for zero in zeros)


def test_expert_parallelism_divides_experts():
    alone, shared = planned(s=BF16), planned(s=BF16, dp=4, ep=4)
    experts = sum(elements(shape) for shape, _, is_one in parameters().values() if is_one)
    for kind in ("weights", "gradients"):
        assert alone.peak_bytes[kind] - shared.peak_bytes[kind] == 2 * experts * 3 // 4
    state = 2 * experts + 2 * 4 * experts // 256  # codes, and a scale for each 256
    assert alone.peak_bytes["optimizer"] - shared.peak_bytes["optimizer"] == state * 3 // 4


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_sharding(zero):
    """dp=4, ep=2: the first GPU has ceil(rows / 4) rows of each parameter, and half of its experts' rows."""
    plan, whole = planned(s=BF16, dp=4, ep=2, zero=zero), planned(s=BF16, dp=4, ep=2)
    states = weights = gradients = 0
    for name, (shape, size, is_expert) in parameters().items():
        rows = ceil(shape[0] / 2 / 2) if is_expert else ceil(shape[0] / 4)
        n = rows * elements(shape[1:])
        weights, gradients = weights + size * n, gradients + size * n
        in_8_bits = len(shape) > 1 and not name.startswith(("word_embeddings", "lm_head"))
        states += 4 + (2 * n + 2 * 4 * ceil(n / 256) if in_8_bits else 2 * 4 * n)  # the step's number is fp32
    assert plan.peak_bytes["optimizer"] == states
    if zero == 3:
        assert plan.peak_bytes["weights"] == weights + whole.peak_bytes["weights"] - sum(
            size * elements(shape) // (2 if is_expert else 1) for shape, size, is_expert in parameters().values()
        )  # the same buffers
        assert plan.peak_bytes["gathered"] > 0
    else:
        assert plan.peak_bytes["weights"] == whole.peak_bytes["weights"]
    if zero > 1:  # at the peak, in the second backward, a layer's may be whole
        assert gradients <= plan.peak_bytes["gradients"] < whole.peak_bytes["gradients"]


def test_stages():
    """Two stages of one layer: the first has the embedding and a dense layer, the second the head and MTP with its own
    copy of the embedding."""
    named = parameters()
    bytes_of = lambda *starts: sum(  # noqa: E731
        size * elements(shape) for name, (shape, size, _) in named.items() if name.startswith(starts)
    )
    plans = [planned(s=replace(BF16, batch=8), stage=i, pp=2) for i in range(2)]
    buffers = [sum(t.nbytes for n, t in Ling(WHOLE).named_buffers() if keep in n or n in ("cos", "sin"))
               for keep in ("none of them", "expert_bias")]  # fmt: skip
    counts = [0, 2 * 4 * WHOLE.num_experts]  # of two routers
    want = [bytes_of("word", "layers.0."), bytes_of("word", "layers.1.", "norm", "lm_head", "mtp")]
    assert [p.peak_bytes["weights"] for p in plans] == [sum(x) for x in zip(want, buffers, counts, strict=True)]
    assert [p.peak_bytes["gradients"] for p in plans] == want
    assert plans[0].peak_bytes["loss"] == 0 < plans[1].peak_bytes["loss"]


def test_micro_batches_in_flight():
    """The first of two stages has two micro batches in flight, or one where the batch is one."""
    one, two = (planned(s=replace(BF16, batch=n), stage=0, pp=2).kept_bytes["activations"] for n in (2, 4))
    last = [planned(s=replace(BF16, batch=n), stage=1, pp=2).kept_bytes["activations"] for n in (2, 4)]
    extra = 2 * 64 * 8 + 3 * 4 + 8  # its tokens, int64, and cu_seqlens
    assert two == pytest.approx(2 * one, abs=4 * extra) and one > 50 * extra
    assert last[1] == pytest.approx(last[0], abs=4 * extra)
    assert [Layout(pp=4).in_flight(i, 8) for i in range(4)] == [4, 3, 2, 1]
    assert Layout(pp=4).in_flight(0, 2) == 2


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("worst", [False, True])
def test_rows_of_the_exchange(precision, worst):
    """T tokens with k choices send T k rows; one of 4 GPUs with 2 experts receives at most 4 T min(k, 2)."""
    from ling_kernels.nn.fp8 import to_fp8

    T, H, k, ep, seen = 64, WHOLE.hidden_size, WHOLE.num_experts_per_tok, 4, []
    with FakeTensorMode(), force("triton"):
        moe = Rank(Layout(dp=ep, ep=ep), worst_load=worst).model(WHOLE).layers[1].mlp
        if precision == "fp8":
            assert len(to_fp8(moe)[0]) == 2
        moe.exchange.mark = lambda t: seen.append(t.nbytes)
        x = torch.empty(T, H, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            moe(x)[0].sum().backward()
    S = T * k
    R = ep * T * min(k, WHOLE.num_experts // ep) if worst else S
    weights = [4 * S, 4 * R] if precision == "fp8" else []  # of the rows, fp32
    back = [4 * S] if precision == "fp8" else []
    there, here = 2 * S * H, 2 * R * H  # bf16
    assert sorted(seen) == sorted([there, here, *weights, here, there, here, *back, there])
    assert x.grad.shape == x.shape and moe.experts.down.grad.shape == (2, H, WHOLE.moe_intermediate_size)


def test_the_worst_load_needs_more():
    even, worst = (planned(dp=4, ep=4, worst_load=w) for w in (False, True))
    assert worst.kept_bytes["activations"] > 1.5 * even.kept_bytes["activations"] and worst.peak > even.peak


def test_distinct_stages():
    c = LingConfig.one_t()  # 80 layers, 4 of them dense
    assert [Layout(pp=n).distinct_stages(c) for n in (8, 40, 1)] == [[0, 1, 7], [0, 1, 2, 39], [0]]


def test_printed_plan(capsys):
    base = "--plan --model mini --mtp 1 --precision fp8 --master bf16 --optimizer adamw8bit --batch 16"
    layout = "dp=8,ep=8,pp=20,zero=1"
    assert main([*base.split(), "--layout", layout]) == 0
    output = capsys.readouterr().out
    assert "17,083,499,776 parameters, on the fullest of 160 GPUs: dp=8, ep=8, pp=20, zero=1" in output
    assert "(2 in flight)" in output and "this is stage 20" in output
    assert "if every token" in output and "\ngathered" not in output


@pytest.mark.parametrize("layout, says", [
    ("ep=3,dp=3", "256 experts of mini are not a multiple of ep 3"), ("pp=3", "20 layers of mini are not a multiple"),
    ("dp=3", "--batch 16 is not a multiple of dp 3"), ("ep=2", "dp 1 is not a multiple of ep 2"), ("tp=2", "'tp=2'"),
    ("dp=2,dp=2", "each once"), ("dp=0", "at least 1"), ("zero=4", "0 to 3"), ("dp=-1", "dp=-1"), ("dp", "'dp'"),
    ("dp=8,zero=3", "each_forward"), ("", "none of"), ("dp=\u00b2", "none of"),
])  # fmt: skip
def test_impossible_layouts(layout, says, capsys):
    batch = ["--batch", "18"] if "ep=3" in layout else []
    assert says in one_line_error(["--preset", "ling-mini-1gpu", "--plan", "--layout", layout, *batch], capsys)


def test_layout_with_muon_and_in_training(capsys, tmp_path):
    argv = ["--model", "mini", "--plan", "--optimizer", "muon", "--layout", "dp=8,zero=1"]
    assert "whole matrices" in one_line_error(argv, capsys)
    assert "for --plan" in one_line_error(["--layout", "dp=8", "--out", str(tmp_path / "run")], capsys)
