"""The plan of one GPU of many: against a plan of one GPU alone, and against bytes added up by hand."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ling_kernels.backend import force
from ling_kernels.model import Ling, LingConfig
from ling_kernels.train.__main__ import main, make_plan
from ling_kernels.train.layout import Layout, Rank
from ling_kernels.train.settings import Settings
from tests.test_fp8_training import WHOLE
from tests.training import one_line_error

FP8 = replace(Settings(), batch=4, micro_batch=2, seq_len=64, precision="fp8", master="bf16", optimizer="adamw8bit")
BF16 = replace(FP8, precision="bf16")


def planned(c=WHOLE, s=FP8, stage=0, worst=False, **layout):
    layout = Layout(**layout)
    return make_plan(c, layout.of_rank(replace(s, batch=s.batch * layout.dp), c), Rank(layout, stage, worst))


def parameters(c=WHOLE):
    """{name: (shape, bytes an element, whether it is an expert's)} with bf16 masters."""
    with FakeTensorMode():
        named = [*Ling(c).named_parameters()]
    wide = lambda n, p: p.ndim < 2 or n.endswith("router.weight")  # noqa: E731
    return {n: (tuple(p.shape), 4 if wide(n, p) else 2, ".mlp.experts." in n) for n, p in named}


def elements(shape):
    return torch.Size(shape).numel()


@pytest.mark.parametrize("s, zeros", [(replace(FP8, fp8_weights="kept"), (0,)), (FP8, (2, 3))])
def test_more_gpus_with_nothing_cut_up_hold_what_one_does(s, zeros):
    alone = make_plan(WHOLE, s)
    assert planned(s=s, dp=3) == alone
    assert all(planned(s=s, zero=zero) == alone for zero in zeros)


def test_experts_are_shared():
    alone, shared = planned(s=BF16), planned(s=BF16, dp=4, ep=4)
    experts = sum(elements(shape) for shape, _, is_one in parameters().values() if is_one)
    for kind in ("weights", "gradients"):
        assert alone.parts[kind] - shared.parts[kind] == 2 * experts * 3 // 4
    state = 2 * experts + 2 * 4 * experts // 256  # codes, and a scale for each 256
    assert alone.parts["optimizer"] - shared.parts["optimizer"] == state * 3 // 4


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_is_cut_up(zero):
    """dp 4 of which 2 share the experts: the first GPU has ceil(rows / 4) of each parameter, of experts half of its."""
    plan, whole = planned(s=BF16, dp=4, ep=2, zero=zero), planned(s=BF16, dp=4, ep=2)
    states = weights = gradients = 0
    for shape, size, is_expert in parameters().values():
        rows = ceil(shape[0] / 2 / 2) if is_expert else ceil(shape[0] / 4)
        n = rows * elements(shape[1:])
        weights, gradients = weights + size * n, gradients + size * n
        states += 4 + (2 * n + 2 * 4 * ceil(n / 256) if len(shape) > 1 else 2 * 4 * n)  # the step's number is fp32
    assert plan.parts["optimizer"] == states
    if zero == 3:
        assert plan.parts["weights"] == weights + whole.parts["weights"] - sum(
            size * elements(shape) // (2 if is_expert else 1) for shape, size, is_expert in parameters().values()
        )  # as many buffers
        assert plan.parts["gathered"] > 0
    else:
        assert plan.parts["weights"] == whole.parts["weights"]
    if zero > 1:  # at the peak, in the second backward, those of a layer may be whole
        assert gradients <= plan.parts["gradients"] < whole.parts["gradients"]


def test_stages():
    """Two of one layer each: the first has the embedding and a dense layer, the second head and MTP, with an embedding
    of its own."""
    named = parameters()
    bytes_of = lambda *starts: sum(  # noqa: E731
        size * elements(shape) for name, (shape, size, _) in named.items() if name.startswith(starts)
    )
    plans = [planned(s=replace(BF16, batch=8), stage=i, pp=2) for i in range(2)]
    buffers = [sum(t.nbytes for n, t in Ling(WHOLE).named_buffers() if keep in n or n in ("cos", "sin"))
               for keep in ("none of them", "expert_bias")]  # fmt: skip
    counts = [0, 2 * 4 * WHOLE.num_experts]  # of two routers
    want = [bytes_of("word", "layers.0."), bytes_of("word", "layers.1.", "norm", "lm_head", "mtp")]
    assert [p.parts["weights"] for p in plans] == [sum(x) for x in zip(want, buffers, counts, strict=True)]
    assert [p.parts["gradients"] for p in plans] == want
    assert plans[0].parts["loss"] == 0 < plans[1].parts["loss"]


def test_micro_batches_in_flight():
    """The first of two stages holds two of them; with a batch that has but one, one."""
    one, two = (planned(s=replace(BF16, batch=n), stage=0, pp=2).kept["activations"] for n in (2, 4))
    last = [planned(s=replace(BF16, batch=n), stage=1, pp=2).kept["activations"] for n in (2, 4)]
    extra = 2 * 64 * 8 + 3 * 4 + 8  # its tokens, int64, and where its rows begin and end
    assert two == pytest.approx(2 * one, abs=4 * extra) and one > 50 * extra
    assert last[1] == pytest.approx(last[0], abs=4 * extra)
    assert [Rank(Layout(pp=4), i).in_flight(8) for i in range(4)] == [4, 3, 2, 1]
    assert Rank(Layout(pp=4)).in_flight(2) == 2


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("worst", [False, True])
def test_rows_of_the_exchange(precision, worst):
    """T tokens with k choices each send T k rows; 4 GPUs with 2 experts each may at the worst get 4 T min(k, 2)."""
    from ling_kernels.nn.fp8 import to_fp8

    T, H, k, ep, seen = 64, WHOLE.hidden_size, WHOLE.num_experts_per_tok, 4, []
    with FakeTensorMode(), force("triton"):
        moe = Rank(Layout(dp=ep, ep=ep), worst=worst).model(WHOLE).layers[1].mlp
        if precision == "fp8":
            assert len(to_fp8(moe)[0]) == 2
        moe.exchange.mark = lambda t: seen.append(t.nbytes)
        x = torch.empty(T, H, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            moe(x)[0].sum().backward()
    S = T * k
    R = ep * T * min(k, WHOLE.num_experts // ep) if worst else S
    weights = [4 * R] if precision == "fp8" else []  # of the slots, fp32
    back = [4 * S] if precision == "fp8" else []
    there, here = 2 * S * H, 2 * R * H  # bf16
    assert sorted(seen) == sorted([there, here, *weights, there, here, *back, there])
    assert x.grad.shape == x.shape and moe.experts.down.grad.shape == (2, H, WHOLE.moe_intermediate_size)


def test_the_worst_load_takes_more():
    even, worst = (planned(dp=4, ep=4, worst=w) for w in (False, True))
    assert worst.kept["activations"] > 1.5 * even.kept["activations"] and worst.peak > even.peak


def test_stages_that_differ():
    c = LingConfig.one_t()  # 80 layers, 4 of them dense
    assert (
        Layout(pp=8).stages(c) == [0, 1, 7] and Layout(pp=40).stages(c) == [0, 1, 2, 39] and Layout().stages(c) == [0]
    )


def test_what_is_printed(capsys):
    base = "--plan --model mini --mtp 1 --precision fp8 --master bf16 --optimizer adamw8bit --batch 16"
    layout = "dp=8,ep=8,pp=20,zero=1"
    assert main([*base.split(), "--layout", layout]) == 0
    said = capsys.readouterr().out
    assert "17,083,499,776 parameters, on the fullest of 160 GPUs: dp=8, ep=8, pp=20, zero=1" in said
    assert "this package trains on one GPU" in said and "(2 in flight)" in said and "this is stage 20" in said
    assert "if every token" in said and "\ngathered" not in said


@pytest.mark.parametrize("layout, says", [
    ("ep=3,dp=3", "256 experts of mini are not a multiple of ep 3"), ("pp=3", "20 layers of mini are not a multiple"),
    ("dp=3", "--batch 16 is not a multiple of dp 3"), ("ep=2", "dp 1 is not a multiple of ep 2"), ("tp=2", "'tp=2'"),
    ("dp=2,dp=2", "each once"), ("dp=0", "at least 1"), ("zero=4", "0 to 3"), ("dp=-1", "dp=-1"), ("dp", "'dp'"),
    ("dp=8,zero=3", "each_forward"), ("", "none of"), ("dp=\u00b2", "none of"),
])  # fmt: skip
def test_layouts_that_do_not_fit(layout, says, capsys):
    batch = ["--batch", "18"] if "ep=3" in layout else []
    assert says in one_line_error(["--preset", "ling-mini-1gpu", "--plan", "--layout", layout, *batch], capsys)


def test_muon_and_training(capsys, tmp_path):
    argv = ["--model", "mini", "--plan", "--optimizer", "muon", "--layout", "dp=8,zero=1"]
    assert "whole matrices" in one_line_error(argv, capsys)
    assert "for --plan" in one_line_error(["--layout", "dp=8", "--out", str(tmp_path / "run")], capsys)
