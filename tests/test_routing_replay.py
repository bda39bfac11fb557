"""Routing replay: the engine records the experts of every token, the trainer's forward takes them."""

import copy
from dataclasses import replace

import pytest
import torch

from ling_kernels.generate import Engine
from ling_kernels.model.sample import Sampling
from ling_kernels.nn import Router
from ling_kernels.posttrain.rollout import answer_logp, rollout
from tests.engines import NO_STOP, drain, make_engine, make_overlapped_engine, model, references

RANDOM = Sampling(temperature=0.9, seed=3)


def chosen(m, ids: list[int]) -> torch.Tensor:
    """[len(ids), M + MTP layers, topk]: the experts that a forward over the whole text chooses."""
    seen, hooks = [], []
    for router in m.routers():
        hooks.append(router.register_forward_hook(lambda router, args, out: seen.append(out[1])))
    m(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, 1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether each row has the same experts, in any order."""
    return torch.equal(a.long().sort(-1).values, b.long().sort(-1).values)


@pytest.mark.parametrize("make", [make_engine, make_overlapped_engine])
@pytest.mark.parametrize("name, draft", [("base", 0), ("base", 2), ("mtp1", 2)])
def test_the_engine_records_what_the_model_chooses(make, name, draft):
    """In chunks, with lanes that pad graphs, with drafts that are rejected, after a cached prefix, at a stop token."""
    e = make(name, draft=draft, max_running=3, max_rows=11, record_routing=True)
    prompts = [*(p for p, _ in references(name)), [5, 9, 5, 7], [*references(name)[0][0], 8]]
    requests = [e.submit(p, RANDOM, 7 + i, **NO_STOP) for i, p in enumerate(prompts)]
    drain(e)
    again = e.submit(requests[0].tokens[:-2], RANDOM, 3, **NO_STOP)
    stop = requests[1].new_tokens[2]
    stopped = [e.submit(prompts[1], RANDOM, 9, [stop], keep_stop=keep) for keep in (False, True)]
    drain(e)
    assert again.cached_tokens > 0
    layers = len(model(name).layers) - model(name).config.first_k_dense_replace
    for r in [*requests, again, *stopped]:
        inputs = r.tokens if r is stopped[0] else r.tokens[:-1]
        assert r.routing.dtype == torch.uint8 and len(r.routing) == len(inputs)
        assert same(r.routing, chosen(model(name), inputs)[:, :layers])


def test_a_preempted_request_and_one_that_is_cancelled():
    e = Engine(model(), page_size=4, cache_tokens=48, max_running=3, record_routing=True)
    requests = [e.submit([*range(1 + i, 14 + i)], max_new_tokens=9, **NO_STOP) for i in range(3)]
    requests.append(e.submit([1, 2], max_new_tokens=9, **NO_STOP))
    e.cancel(requests[3])
    drain(e)
    for r in requests[:3]:
        assert same(r.routing, chosen(model(), r.tokens[:-1]))
    assert requests[3].routing is None and make_engine().finish([[1, 2]], max_new_tokens=1)[0].routing is None


@pytest.fixture(scope="module")
def trained():
    """A model with MTP layers in training mode, ids, and the experts that it chooses for them."""
    m = copy.deepcopy(model("mtp1")).train().requires_grad_()
    ids = torch.randint(0, m.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    return m, ids, chosen(m, ids[0].tolist())


def gradients(m, ids, **options) -> tuple[torch.Tensor, dict]:
    m.zero_grad()
    out = m(ids, labels=ids, logits=False, **options)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mtp", [False, True])
def test_gradients_are_equal_where_the_experts_agree(trained, recompute, mtp):
    m, ids, experts = copy.deepcopy(trained[0]), *trained[1:]
    loss, want = gradients(m, ids)
    if recompute:
        m.recompute_()
    experts = experts if mtp else experts[:, : -len(m.mtp)]
    replayed, got = gradients(m, ids, experts=experts[None].to(torch.uint8))
    assert torch.equal(replayed, loss) and got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("recompute", [False, True])
def test_given_experts_compute_and_not_the_live_ones(trained, recompute):
    m, ids, experts = copy.deepcopy(trained[0]), *trained[1:]
    others = (experts + 1) % m.config.num_experts
    forced = iter(others.unbind(1))
    hooks = [r.register_forward_pre_hook(lambda r, args: (*args[:2], next(forced).int())) for r in m.routers()]
    loss, want = gradients(m, ids)  # each router is handed them by a hook
    for hook in hooks:
        hook.remove()
    if recompute:
        m.recompute_()
    m.balance_(0.0)
    got_loss, got = gradients(m, ids, experts=others[None])
    assert torch.equal(got_loss, loss) and abs(got_loss - gradients(copy.deepcopy(m), ids)[0]) > 1e-6
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name
    assert want["layers.1.mlp.router.weight"].abs().sum() > 0, "routing weights come from the live logits"
    for i, router in enumerate(x for x in m.modules() if isinstance(x, Router)):
        assert torch.equal(router.counts, others[:, i].flatten().bincount(minlength=m.config.num_experts).int())


@pytest.mark.parametrize(
    "shape, dtype", [((1, 24, 9, 4), torch.int32), ((1, 23, 2, 4), torch.int32), (None, torch.float32)]
)
def test_experts_that_do_not_fit(trained, shape, dtype):
    m, ids, experts = trained
    wrong = experts[None].to(dtype) if shape is None else torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=r"experts \[B, L, M, \d\] of integers"):
        m(ids, experts=wrong)


def test_padded_batches_replay_row_by_row(trained):
    m, ids, experts = trained[0], *trained[1:]
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 10:] = 0
    both = torch.stack([experts, (experts + 1) % m.config.num_experts])
    out = m(ids.expand(2, -1), attention_mask=mask, experts=both).logits
    alone = m(ids[:, :10], experts=both[1:, :10]).logits
    torch.testing.assert_close(out[1, :10], alone[0], rtol=1e-4, atol=1e-5)


def test_log_probabilities_of_answers_replay_their_routing():
    e, m = make_engine(record_routing=True), copy.deepcopy(model())
    answers = rollout(e, [p for p, _ in references()], 2, 6, seed=1, ends=[])
    live = answer_logp(m, [replace(a, routing=None) for a in answers])
    torch.testing.assert_close(answer_logp(m, answers), live, rtol=1e-5, atol=1e-5)
    for a in answers:
        a.routing = (a.routing.int() + 1) % m.config.num_experts
    assert (answer_logp(m, answers) - live).abs().max() > 1e-3
