"""DPO's loss against its formula written out, as TRL has it, and through a model."""

import copy
import math

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.posttrain import Answer, answer_logp, preference_loss
from tests.engines import model

LENGTHS = [3, 5, 1, 4, 2, 2]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    ref = -4 * torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64)
    logp = (ref + torch.randn(len(ref), generator=g, dtype=torch.float64)).requires_grad_()
    return logp, ref, torch.tensor(LENGTHS)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_formula_written_out(batch, smoothing):
    logp, ref, lengths = batch
    out = preference_loss(logp, ref, lengths, beta=0.3, label_smoothing=smoothing)
    ratios, at = [], 0
    for n in LENGTHS:
        ratios.append(sum(logp[t] - ref[t] for t in range(at, at + n)))
        at += n
    total, right = 0, 0
    for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True):
        delta = 0.3 * (chosen - rejected)
        total -= (1 - smoothing) * torch.log(1 / (1 + torch.exp(-delta))) + smoothing * torch.log(
            1 / (1 + torch.exp(delta))
        )
        right += delta.item() > 0
    torch.testing.assert_close(out.loss, total / 3)
    assert out.accuracy.item() == pytest.approx(right / 3)
    (got,), (want,) = torch.autograd.grad(out.loss, logp), torch.autograd.grad(total / 3, logp)
    torch.testing.assert_close(got, want)


def test_at_the_reference_the_loss_is_log_2(batch):
    _, ref, lengths = batch
    out = preference_loss(ref.clone().requires_grad_(), ref, lengths)
    assert out.loss.item() == pytest.approx(math.log(2)) and out.margin == out.accuracy == 0


def test_a_step_makes_the_chosen_answer_likelier():
    m = copy.deepcopy(model()).requires_grad_()
    pairs = [Answer([5, 9], ids, [], "", 0) for ids in ([7, 8, 9], [3, 2], [4, 4], [6, 1, 2, 3])]
    lengths = torch.tensor([len(a.ids) for a in pairs])
    reference = answer_logp(m, pairs).detach()
    before = preference_loss(answer_logp(m, pairs), reference, lengths)
    before.loss.backward()
    with torch.no_grad():
        for p in m.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
    after = preference_loss(answer_logp(m, pairs), reference, lengths)
    assert after.loss < before.loss and after.margin > 0 and after.accuracy == 1


@pytest.mark.parametrize("wrong, text", [
    (dict(lengths=torch.tensor([8, 9, 0])), "a chosen and a rejected"),
    (dict(lengths=torch.tensor([8, 8])), "17 tokens"),
    (dict(logp=[0.0]), "logp is list, not a tensor"), (dict(lengths=[8, 9]), "lengths is list, not a tensor"),
    (dict(beta=float("inf")), "beta is above 0"), (dict(beta="x"), "beta is above 0"),
    (dict(beta=0.0), "beta is above 0"), (dict(label_smoothing=0.5), "below 0.5"),
    (dict(reference_logp=torch.zeros(3)), "one for each token"), (dict(lengths=torch.tensor([8.5, 8.5])), "int64"),
])  # fmt: skip
def test_what_does_not_fit(batch, wrong, text):
    arguments = dict(zip(("logp", "reference_logp", "lengths"), batch, strict=True)) | wrong
    with pytest.raises(InputError, match=text):
        preference_loss(**arguments)


def test_half_precision_identical_and_empty_answers(batch):
    logp, reference, lengths = batch
    halves = logp.detach().bfloat16(), reference.bfloat16()
    got, want = preference_loss(*halves, lengths), preference_loss(*(t.double() for t in halves), lengths)
    torch.testing.assert_close(got.loss.double(), want.loss)
    same = preference_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0]), torch.tensor([1, 1]))
    empty = preference_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([1, 0]), beta=0.5)
    assert same.margin == 0 and same.accuracy == 0 and empty.margin == 0.5 and empty.accuracy == 1
