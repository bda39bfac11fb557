"""The one MoE data flow: experts behind an exchange give what local ones do, in bf16 and in FP8."""

import copy

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.nn import MLP, Experts, Local, MoE, Router
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.ops.dispatch import Plan, dispatch
from ling_kernels.ops.permute import permute
from ling_kernels.ops.route import route
from ling_kernels.ops.unpermute import unpermute
from tests.cases import runs

T, E, H, F, TOPK = 37, 8, 128, 128, 3


class ReceivedPlan(Plan):
    pass


class Shuffled:
    """An exchange as over several devices: a row for every choice, received in random order, as one choice each."""

    local = False

    def __init__(self, experts: Experts):
        self.experts, self.calls = experts, 0

    def dispatch(self, x, weights, experts, counts):
        self.calls += 1
        sent = dispatch(experts, counts)
        order = torch.randperm(len(sent.source))
        rows, owners = permute(x, sent)[order], experts.flatten()[sent.source.long()][order, None]
        plan = ReceivedPlan(*dispatch(owners, counts))
        plan.sent, plan.back = sent, order.argsort()
        if self.experts.fold_weights:
            plan.weights = None
            return rows, plan, weights.flatten()[sent.source.long()][order, None]
        plan.weights = weights
        return rows, plan, None

    def combine(self, y, plan):
        return unpermute(y[plan.back], plan.sent, plan.weights)


def layer(fold: bool, fp8: bool, dtype=torch.bfloat16) -> MoE:
    torch.manual_seed(0)
    router = Router(H, E, num_groups=4, group_topk=2, topk=TOPK)
    moe = MoE(router, Experts(E, H, F, fold), MLP(H, F)).to(dtype)
    if fp8:
        assert len(to_fp8(moe)[0]) == 2
    return moe


def result(moe: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    moe.zero_grad()
    y, z = moe(x, 0.1)
    (y.float().square().sum() + z).backward()
    return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]


@pytest.mark.parametrize("fold, fp8", [(False, False), (True, False), (True, True)])
def test_an_exchange_equals_local_experts(fold, fp8):
    """Bit for bit where the routing weight is applied at the same place: the sum over a token's choices is the same."""
    moe, x = layer(fold, fp8), torch.randn(T, H).bfloat16()
    assert isinstance(moe.exchange, Local)
    want = result(moe, x)
    moe.exchange = exchange = Shuffled(moe.experts)
    got = result(moe, x)
    assert exchange.calls == 1
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert w.float().abs().sum() > 0
        if i == 0:
            assert torch.equal(g, w)
        else:  # weight gradients sum rows in another order
            torch.testing.assert_close(g.float(), w.float(), rtol=0.02, atol=0.01 * w.float().abs().max().item())


def test_the_shared_expert_runs_beside_the_exchange(monkeypatch):
    """On a second stream of a GPU, from before the dispatch: each stream waits where it reads what the other wrote, and
    memory that both use is marked. Streams are recorded here, not run."""
    events, names = [], {}

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            events.append(f"on {self.name}")

        def __exit__(self, *_):
            events.append(f"off {self.name}")

    first, second = Stream("first"), Stream("second")
    monkeypatch.setattr("ling_kernels.nn.beside.second_stream", lambda x: second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: events.append(f"{names[id(t)]} in {stream.name}")
    )
    moe, x = layer(False, False), torch.randn(T, H).bfloat16()
    want, _ = moe(x)
    assert not events  # local experts: nothing to run beside

    def shared(module, inputs, y):
        events.append("shared expert")
        names.update({id(inputs[0]): "x", id(y): "y"})

    moe.exchange = exchange = Shuffled(moe.experts)
    moe.shared_experts.register_forward_hook(shared)
    dispatch = exchange.dispatch
    monkeypatch.setattr(exchange, "dispatch", lambda *args: events.append("dispatch") or dispatch(*args))
    assert torch.equal(moe(x)[0], want)
    assert events == ["second waits for first", "on second", "shared expert", "off second", "x in second", "dispatch",
                      "first waits for second", "y in first"]  # fmt: skip


def test_weights_folded_or_not_differ_by_rounding_only():
    x = torch.randn(T, H)
    a, b = (layer(fold, False, torch.float32) for fold in (False, True))
    for g, w in zip(result(a, x), result(b, x), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fp8", [False, True])
def test_forced_experts(fp8):
    """The layer's own choice, forced, changes nothing; another choice gives another result, with weights from x."""
    moe, x = layer(fp8, fp8), torch.randn(T, H).bfloat16()
    _, experts, _, _ = moe.router(x)
    y, _ = moe(x)
    assert torch.equal(moe(x, experts=experts)[0], y)
    other = (experts + 1) % E
    forced = moe(x, experts=other)[0]
    assert not torch.equal(forced, y)
    biased = copy.deepcopy(moe)
    biased.router.expert_bias.normal_()
    assert torch.equal(biased(x, experts=other)[0], forced)  # the bias only selects


def test_forced_route_is_the_formula():
    """s = sigmoid(logits) of the given experts over their sum, times scale; gradients as autograd's."""
    logits, scale = torch.randn(T, E, dtype=torch.float64, requires_grad=True), 2.5
    experts = torch.rand(T, E).argsort(1)[:, :TOPK].int()
    experts[3] = -1
    weights, chosen, counts = route(logits, torch.zeros(E).double(), None, 1, 1, TOPK, scale, experts=experts)
    s = logits.sigmoid().gather(1, experts.clamp(min=0).long())
    want = torch.where(experts < 0, 0, s / s.sum(1, keepdim=True) * scale)
    torch.testing.assert_close(weights, want)
    assert torch.equal(chosen, experts) and counts.tolist() == [(experts == e).sum().item() for e in range(E)]
    cotangent = torch.randn(T, TOPK).double()
    got, wanted = (torch.autograd.grad(w, logits, cotangent)[0] for w in (weights, want))
    torch.testing.assert_close(got, wanted)
    twice, partial = experts.clone(), experts.clone()
    twice[0, 1], partial[0, 1] = twice[0, 0], -1
    for wrong in (experts[:5], experts.long(), experts + E, twice, partial, experts.tolist()):
        with pytest.raises(ValueError, match="experts"):
            route(logits, torch.zeros(E).double(), None, 1, 1, TOPK, scale, experts=wrong)


@pytest.mark.parametrize("backend", [b for b in ("torch", "triton", "cuda") if runs(b)])
def test_no_tokens(backend):
    """The gradient of an empty sum is an expanded tensor, whose strides are 0."""
    moe, x = layer(False, False), torch.zeros(0, H, dtype=torch.bfloat16, requires_grad=True)
    with force(backend):
        moe(x)[0].sum().backward()
    assert x.grad.shape == (0, H) and not moe.experts.down.grad.any()


def test_an_incomplete_exchange_is_refused_where_it_is_set():
    class WithoutLocal:
        def dispatch(self, x, weights, experts, counts): ...

        def combine(self, y, plan): ...

    class WithoutCombine:
        local = True

        def dispatch(self, x, weights, experts, counts): ...

    parts = Router(H, E, num_groups=4, group_topk=2, topk=TOPK), Experts(E, H, F), None
    moe = MoE(*parts)
    for wrong in (WithoutLocal(), WithoutCombine()):
        with pytest.raises(ValueError, match="an exchange with `local`, `dispatch` and `combine`"):
            MoE(*parts, wrong)
        with pytest.raises(ValueError, match="an exchange with"):
            moe.exchange = wrong
    assert type(moe.exchange) is Local
