"""The policy losses of trainers with padded rows, beside those of packed ones."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.posttrain import (
    METHODS,
    padded_policy_loss,
    policy_loss,
    sentence_lengths,
    sentence_numbers,
    verl_policy_loss,
)
from ling_kernels.tokenizer import Tokenizer

TEXTS = ["One. Two!", "No pause", "", "Why? a; b."]


@pytest.fixture
def batch() -> dict:
    """Four answers, the third without tokens; what is beyond an answer's end is NaN, and has no gradient."""
    ids = [Tokenizer().encode(text) for text in TEXTS]
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(max(map(len, ids))) < torch.tensor([len(i) for i in ids])[:, None]
    old = torch.full(mask.shape, float("nan"), dtype=torch.float64)
    old[mask] = -1 - torch.rand(int(mask.sum()), generator=g, dtype=torch.float64)
    logp = (old + 0.3 * torch.randn(mask.shape, generator=g, dtype=torch.float64)).requires_grad_()
    padded = torch.full(mask.shape, 46)  # a full stop
    padded[mask] = torch.tensor(sum(ids, []))
    return dict(logp=logp, old_logp=old, advantages=torch.tensor([1.3, -0.7, 0.2, -1.1]), mask=mask, ids=padded)


def packed(batch: dict, method: str, **options) -> torch.Tensor:
    lengths = [
        sentence_lengths(Tokenizer(), row[kept].tolist()) for row, kept in zip(batch["ids"], batch["mask"], strict=True)
    ]
    mask, of = batch["mask"], METHODS[method] | options
    sentences = torch.tensor(sum(lengths, [])) if of["level"] == "sentence" else None
    rows = (batch[name][mask] for name in ("logp", "old_logp"))
    return policy_loss(*rows, batch["advantages"], mask.sum(1), sentences=sentences, **of).loss


def equal(got: torch.Tensor, want: torch.Tensor, logp: torch.Tensor) -> None:
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients)
    assert gradients[1].isfinite().all() and gradients[1].count_nonzero() > 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_give_what_packed_tokens_give(batch, method):
    want, ids = packed(batch, method), batch.pop("ids")
    sentences = sentence_numbers(Tokenizer(), ids, batch["mask"]) if method == "lpo" else None
    for advantages in (batch["advantages"], batch["advantages"][:, None] * batch["mask"]):
        rows = batch | dict(advantages=advantages)
        got = padded_policy_loss(**rows, sentence_numbers=sentences, **METHODS[method])
        equal(got.loss, want, batch["logp"])


def test_tokens_left_out_within_an_answer(batch):
    """A tool's tokens, as TRL masks them: the sentence goes on behind them, without them."""
    ids, mask = batch.pop("ids"), batch["mask"]
    numbers = sentence_numbers(Tokenizer(), ids, mask)
    batch["mask"] = mask.clone()
    batch["mask"][0, 6:8] = False  # of the second sentence, tokens 5 to 8
    got = padded_policy_loss(**batch, sentence_numbers=numbers, **METHODS["lpo"])
    logp, old = (batch[name][batch["mask"]] for name in ("logp", "old_logp"))
    left = batch["mask"].sum(1)
    sentences = torch.tensor([5, 2, *sentence_lengths(Tokenizer(), ids[1][mask[1]].tolist()), 5, 3, 2])
    want = policy_loss(logp, old, batch["advantages"], left, sentences=sentences, **METHODS["lpo"])
    equal(got.loss, want.loss, batch["logp"])


def as_verl_averages(terms: torch.Tensor, mask: torch.Tensor, mode: str, tokens=None, rows=None, copies=1):
    """verl's agg_loss, by its description: over the tokens, or over the rows with tokens; or over a whole batch's."""
    terms = terms.masked_fill(~mask, 0)
    if mode == "token-mean":
        return terms.sum() / (tokens or mask.sum()) * copies
    return (terms.sum(1) / mask.sum(1).clamp(min=1)).sum() / (rows or mask.any(1).sum()) * copies


@pytest.mark.parametrize("batch_info", [None, dict(batch_num_tokens=70, global_batch_size=9, dp_size=2)])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("method", ["grpo", "gspo"])
def test_verls_shape(batch, method, mode, batch_info):
    logp, old, mask = (batch[name] for name in ("logp", "old_logp", "mask"))
    weights = 1 + torch.arange(mask.shape[1]).double().expand_as(mask) / 10
    advantages = batch["advantages"][:, None] * mask
    config = SimpleNamespace(global_batch_info=batch_info) if batch_info else None
    got, metrics = verl_policy_loss(method)(
        old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask.long(), loss_agg_mode=mode,
        config=config, rollout_is_weights=weights,
    )  # fmt: skip
    change = (logp - old).masked_fill(~mask, 0)
    if method == "gspo":
        change = (change.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(mask)
    low, high = METHODS[method]["clip"] if method == "gspo" else (0.2, 0.2)
    ratio = change.exp()
    terms = -weights * torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    info = batch_info or dict(batch_num_tokens=None, global_batch_size=None, dp_size=1)
    equal(got, as_verl_averages(terms, mask, mode, *info.values()), logp)
    assert {*metrics} == {"actor/pg_clipfrac", "actor/ratio"} and 0 < metrics["actor/pg_clipfrac"] < 1


def test_no_tokens():
    rows = torch.zeros(2, 3, requires_grad=True)
    for method in METHODS:
        options = dict(sentence_numbers=torch.zeros(2, 3, dtype=torch.int64)) if method == "lpo" else {}
        out = padded_policy_loss(rows, rows, torch.ones(2), torch.zeros(2, 3), **METHODS[method], **options)
        assert out.loss == 0 and torch.autograd.grad(out.loss, rows)[0].eq(0).all()


def test_what_does_not_fit(batch):
    del batch["ids"]
    with pytest.raises(InputError, match="sentence_numbers has shape .4., not .4, 10."):
        padded_policy_loss(**batch, sentence_numbers=torch.zeros(4), level="sentence")
    with pytest.raises(InputError, match="rows are .B, L.; got .40."):
        padded_policy_loss(**batch | dict(logp=batch["logp"].flatten()))
    uneven = torch.arange(40.0).view(4, 10)
    with pytest.raises(InputError, match="advantages differ within a response"):
        padded_policy_loss(**batch | dict(advantages=uneven))
    with pytest.raises(InputError, match="loss_agg_mode is one of token-mean, seq-mean-token-mean; not 'sum'"):
        verl_policy_loss("grpo")(*(None,) * 4, loss_agg_mode="sum")
    with pytest.raises(InputError, match="method is one of grpo, dapo, gspo; not 'lpo'"):
        verl_policy_loss("lpo")


def test_the_pages_code_runs():
    page = (Path(__file__).parents[1] / "docs/posttraining.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "verl_policy_loss" in block)
    seen: dict = {}
    exec(code, seen)
    assert seen["sentences"].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert seen["logp"].grad.count_nonzero() > 0 == seen["logp"].grad[0, 4:].count_nonzero()
