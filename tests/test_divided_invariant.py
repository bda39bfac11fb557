"""A pinned engine over four processes, on gloo: its bits do not depend on the batch."""

# ruff: noqa: F811 (a fixture is imported)
from dataclasses import replace

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, divided
from ling_kernels.model import LingConfig, load_model
from tests.test_batch_invariant import texts
from tests.test_divided_engine import FP32, divided_engine, forked, saved  # noqa: F401
from tests.test_model import DATA

RANKS = 4  # of two, a sum has one order only
WANTED = dict(max_new_tokens=7, stop_token_ids=(), logprobs=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint far from uniform, whose parts are no multiples of a tile."""
    config = replace(
        LingConfig.tiny(), hidden_size=72, num_hidden_layers=2, vocab_size=332, num_key_value_heads=4,
        num_attention_heads=8,
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("model"), size=3)


def bits(requests):
    return [(r.new_tokens, [t.logprob for t in r.logprobs], [t.logprob for t in r.prompt_logprobs]) for r in requests]


def test_the_batch_changes_no_bit(folder):
    """Texts alone; and together, in chunks, with drafts, with cached prefixes."""
    with divided_engine(folder, n=RANKS, batch_invariant=True, max_rows=64, cache_tokens=4000) as engine:
        alone = [bits(engine.finish([text], prompt_logprobs=0, **WANTED))[0] for text in texts(10)]
    options = dict(max_rows=15, draft=2, page_size=7, cache_tokens=4000, max_running=5)
    with divided_engine(folder, n=RANKS, batch_invariant=True, **options) as engine:
        assert bits(engine.finish(texts(10), prompt_logprobs=0, **WANTED)) == alone
        again = engine.finish(texts(10), **WANTED)
        assert sum(r.cached_tokens for r in again) > 200
        assert bits(again) == [(tokens, logprobs, []) for tokens, logprobs, _ in alone]
    want = Engine(load_model(folder, torch.float32), cache_tokens=4000).finish(texts(10), **WANTED)
    for (tokens, logprobs, _), r in zip(alone, want, strict=True):
        assert tokens == r.new_tokens and logprobs == pytest.approx([t.logprob for t in r.logprobs], abs=1e-3)


def test_what_cannot_be_pinned(tmp_path):
    for options, message in (
        (dict(load=FP32 | dict(dtype=torch.float16)), "batch_invariant is for bf16 on a GPU and bf16 or fp32 on a CPU"),
        (dict(cache_dtype=torch.bfloat16), "batch_invariant needs a cache in the model's precision"),
        (dict(adapters=dict(a=tmp_path)), "batch_invariant does not cover adapters"),
    ):
        with pytest.raises(InputError, match=message):
            divided.DividedEngine(DATA / "base", 2, options.pop("load", FP32), batch_invariant=True, **options)
        assert not torch.distributed.is_initialized()
