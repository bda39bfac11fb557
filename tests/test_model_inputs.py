"""What Ling.forward and Ling.generate refuse, and what padding and damaged logits may not change."""

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.model.decode import greedy
from ling_kernels.model.sample import sampler
from tests.test_model import load, near

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
ADDITIVE = torch.zeros(2, 12).index_fill(1, torch.arange(5), -1e9)
MISMATCHED = {
    "one label": dict(labels=torch.tensor([[5]])), "flat labels": dict(labels=IDS.flatten()),
    "a column short": dict(labels=IDS[:, :-1]), "a column more": dict(labels=IDS.repeat(1, 2)[:, :13]),
    "transposed labels": dict(labels=IDS.T), "two columns more": dict(labels=IDS.repeat(1, 2)[:, :14]),
    "float labels": dict(labels=IDS.float()), "int32 labels": dict(labels=IDS.int()),
    "bool labels": dict(labels=IDS > 9),
    "flat mask": dict(attention_mask=torch.ones(24)), "transposed mask": dict(attention_mask=torch.ones(12, 2)),
    "4-D mask": dict(attention_mask=torch.ones(2, 1, 12, 12)), "additive mask": dict(attention_mask=ADDITIVE),
    "additive mask of -inf": dict(attention_mask=ADDITIVE.masked_fill(ADDITIVE < 0, -torch.inf)),
    "additive mask without padding": dict(attention_mask=torch.zeros(2, 12)),
    "mask of documents": dict(attention_mask=torch.arange(1, 3)[:, None].expand(2, 12)),
    "mask of weights": dict(attention_mask=torch.full((2, 12), 0.5)),
    "mask of NaN": dict(attention_mask=torch.full((2, 12), torch.nan)),
    "mask of -1": dict(attention_mask=-torch.ones(2, 12).long()),
    "target_counts without MTP's": dict(labels=IDS, target_counts=[22.0]),
}  # fmt: skip
BOUNDS = {
    "a list": [0, 24], "none": torch.tensor([], dtype=torch.int32), "only 0": torch.tensor([0], dtype=torch.int32),
    "of a matrix": torch.tensor([[0, 24]], dtype=torch.int32), "floats": torch.tensor([0.0, 24.0]),
    "int64": torch.tensor([0, 24]), **{str(b): torch.tensor(b, dtype=torch.int32) for b in (
        [1, 24], [24], [0, 5], [0, 25], [0, 7, 5, 24], [-1, 24],
    )},
}  # fmt: skip


@pytest.mark.parametrize("how", BOUNDS)
def test_bounds_of_documents_that_do_not_fit_raise(how):
    with pytest.raises(ValueError, match="expected cu_seqlens"):
        load("base")(IDS, labels=IDS, cu_seqlens=BOUNDS[how], logits=False)


@pytest.mark.parametrize("ids", [[[1, 2]], IDS[0], IDS.float(), IDS.bool(), IDS.to(torch.uint8), IDS.short()],
                         ids=lambda ids: str(getattr(ids, "dtype", "list")))  # fmt: skip
def test_ids_of_another_kind_raise(ids):
    with pytest.raises(ValueError, match="expected input_ids"):
        load("base")(ids)


@pytest.mark.parametrize("number", [2.5, "2", None])
def test_a_number_of_new_tokens_that_is_no_integer_raises(number):
    with pytest.raises(ValueError, match="expected max_new_tokens"):
        load("base").generate(IDS, number)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("how", MISMATCHED)
def test_labels_and_masks_of_another_shape_or_kind_raise(how, logits):
    arguments = MISMATCHED[how]
    mask = torch.ones(2, 12).long().index_fill(1, torch.tensor(0), 0)
    model = load("mtp1")
    for more in [{}] if "attention_mask" in arguments else [{}, dict(attention_mask=mask)]:
        with pytest.raises(ValueError, match="expected (labels|attention_mask|target_counts)"):
            model(IDS, logits=logits, **arguments, **more)
    if "attention_mask" in arguments:
        with pytest.raises(ValueError, match="expected attention_mask"):
            model.generate(IDS, 2, **arguments)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32], ids=str)
def test_masks_of_every_type_mean_the_same(kind):
    mask = torch.ones(2, 12).index_fill(1, torch.arange(3), 0)
    with torch.no_grad():
        got = load("base")(IDS, IDS, attention_mask=mask.to(kind))
        want = load("base")(IDS[:, 3:], IDS[:, 3:])
    near(got.loss, want.loss, 1e-6)
    assert load("base")(IDS, attention_mask=torch.zeros(2, 12, dtype=torch.long)).logits.count_nonzero() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_repetition_penalty_does_not_count_padding(side):
    """The padding's token is one that the model would choose: alone and padded, a prompt gives the same text."""
    model = load("base")
    prompt = IDS[:1, :5]
    with torch.no_grad():
        likely = model(prompt).logits[0, -1].argmax().item()
    padding = torch.full((1, 7), likely)
    parts = [padding, prompt] if side == "left" else [prompt, padding]
    mask = torch.cat([torch.full_like(p, p is prompt) for p in parts], 1)
    ids, seen = torch.cat(parts, 1), []

    def choose(logits, ids):
        seen.append(set(ids[0].tolist()))
        return sampler(repetition_penalty=5.0)(logits, ids)

    alone = model.generate(prompt, 6, choose=sampler(repetition_penalty=5.0))[:, 5:]
    assert likely not in prompt and alone[0, 0] == likely, "the test's own condition"
    both_mask = torch.cat([mask, torch.ones_like(mask)])
    both = model.generate(torch.cat([ids, IDS[1:]]), 6, attention_mask=both_mask, choose=choose)
    assert torch.equal(both[:1, 12:], alone) and torch.equal(both[:, :12], torch.cat([ids, IDS[1:]]))
    assert seen[0] == set(prompt[0].tolist())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_greedy_with_bad_logits_is_an_error(bad):
    """In one row of a batch too."""
    model = load("base")
    with torch.no_grad():
        model.lm_head.weight[5] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        model.generate(IDS, 3)
    logits = torch.zeros(3, 8)
    assert greedy(logits, IDS).tolist() == [0, 0, 0]
    logits[1, 6] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        greedy(logits, IDS)
    with pytest.raises(InputError, match="NaN or infinite"):
        greedy(torch.full((1, 8), -torch.inf), IDS)
