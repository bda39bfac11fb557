"""A model with batch_invariant_: engine and trainer have the same log-probabilities, to the bit, whatever the batch."""

import copy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn import lora_
from ling_kernels.nn.batch_invariant import ROWS, attend, batch_invariant_
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.ops.attention import attention
from ling_kernels.posttrain.rollout import Answer, answer_logp


@cache
def pinned() -> Ling:
    """A model with MTP, whose hidden size is no multiple of a tile."""
    m = Ling(replace(LingConfig.tiny(), hidden_size=72, num_hidden_layers=2, vocab_size=331))
    m.init_weights(torch.Generator().manual_seed(1))
    for p in m.parameters():
        p.data *= 3 if p.ndim > 1 else 1  # far from uniform
    batch_invariant_(m)
    return m.eval()


def texts(number: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    lengths = [1, 2, 5, 16, 17, 63, 64, 65, 130, 3][:number]
    return [torch.randint(0, 331, (n,), generator=g).tolist() for n in lengths]


@cache
def alone() -> list[tuple[list[int], list[float], list[float]]]:
    """Of each text what an engine that serves it alone gives: new tokens, their and the prompt's log-probabilities."""
    e, out = Engine(pinned(), cache_tokens=4000), []
    for text in texts(10):
        (r,) = e.finish([text], max_new_tokens=7, stop_token_ids=(), logprobs=0, prompt_logprobs=0)
        out.append((r.new_tokens, [t.logprob for t in r.logprobs], [t.logprob for t in r.prompt_logprobs]))
    return out


@pytest.mark.parametrize("options", [
    dict(max_running=10), dict(max_running=3, max_rows=9, page_size=4), dict(max_running=5, draft=2, page_size=7),
    dict(max_running=10, cache_tokens=320, page_size=8, record_routing=True),
], ids=["together", "chunks", "drafts", "preempted"])  # fmt: skip
def test_the_engines_batch_changes_no_bit(options):
    e = Engine(pinned(), **dict(cache_tokens=4000) | options)
    wanted = dict(max_new_tokens=7, stop_token_ids=(), logprobs=0, prompt_logprobs=0)
    requests = e.finish(texts(10), **wanted) + e.finish([texts(10)[5]], max_new_tokens=7, stop_token_ids=(), logprobs=0)
    assert requests[-1].cached_tokens > 0 or options.get("page_size", 64) == 64
    for r, (new, logprobs, of_prompt) in zip(requests, [*alone(), alone()[5]], strict=True):
        assert r.new_tokens == new and [t.logprob for t in r.logprobs] == logprobs
        assert [t.logprob for t in r.prompt_logprobs] in (of_prompt, [])


@pytest.mark.parametrize("order", [range(10), [3], [9, 0], [8, 7, 8, 1]])
def test_the_trainer_has_the_engines_bits(order):
    answers = [Answer(texts(10)[i], alone()[i][0], alone()[i][1], "length", 0) for i in order]
    m = copy.deepcopy(pinned()).train()
    logp = answer_logp(m, answers)
    assert logp.requires_grad and logp.tolist() == [x for a in answers for x in a.logprobs]
    prompts = [Answer(t[:1], t[1:], [], "", 0) for t in (texts(10)[i] for i in order) if len(t) > 1]
    if prompts:
        assert answer_logp(m, prompts).tolist() == [x for i in order for x in alone()[i][2]]


def test_without_the_switch_the_bits_differ():
    """Otherwise the tests above would show nothing."""
    m = Ling(pinned().config)
    m.load_state_dict(pinned().state_dict())
    e = Engine(m, cache_tokens=4000)
    got = e.finish(texts(10), max_new_tokens=7, stop_token_ids=(), logprobs=0)
    assert [[t.logprob for t in r.logprobs] for r in got] != [logprobs for _, logprobs, _ in alone()]
    for r, (new, logprobs, _) in zip(got, alone(), strict=True):
        if r.new_tokens == new:
            torch.testing.assert_close(torch.tensor([t.logprob for t in r.logprobs]), torch.tensor(logprobs))


def test_gradients_are_the_models():
    plain = Ling(pinned().config)
    plain.load_state_dict(pinned().state_dict())
    m = copy.deepcopy(pinned())
    ids = torch.tensor(texts(9)[-1])[None]
    for model in (plain.train(), m.train()):
        model(ids, labels=ids, logits=False, z_loss=1e-3).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), m.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5 + 1e-3 * p.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("n, L", [(1, 1), (1, 64), (3, 65), (20, 20), (64, 200)])
def test_attention_by_tiles(n, L):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, 24, generator=g) for rows, heads in ((n, 4), (L, 2), (L, 2)))
    bounds = [torch.tensor([0, rows], dtype=torch.int32) for rows in (n, L)]
    want, _ = attention(q, k, v, *bounds)
    torch.testing.assert_close(attend(q, k, v), want, rtol=1e-4, atol=1e-5)


def test_models_that_cannot_be_pinned():
    with pytest.raises(InputError, match=r"bf16 or fp32 on a CPU: word_embeddings.weight is torch.float16"):
        batch_invariant_(Ling(LingConfig.tiny()).half())
    with pytest.raises(InputError, match="layers.0.attention, which has no QK norm"):
        batch_invariant_(Ling(replace(LingConfig.tiny(), use_qk_norm=False)))
    m = Ling(LingConfig.tiny())
    lora_(m, rank=4, on=("mlp",))
    with pytest.raises(InputError, match="cannot pin layers.0.mlp.gate_up_adapter, an adapter"):
        batch_invariant_(m)
    assert not any(layer.attention.pinned for layer in m.layers), "a model that is refused stays as it was"
    assert ROWS >= 4


@pytest.mark.parametrize("change", [to_fp8, partial(lora_, rank=4, on=("mlp",))], ids=["fp8", "adapters"])
def test_a_pinned_model_takes_no_layers_that_are_not_pinned(change):
    m = copy.deepcopy(pinned())
    before = [type(module) for module in m.modules()]
    with pytest.raises(InputError, match="would undo batch_invariant_, which has pinned layers.0.attention"):
        change(m)
    assert [type(module) for module in m.modules()] == before
