"""Several copies of the optimizer's state (--dp-replicate): every rank has the bits of its equals in other copies after
steps, with random bits too; each gradient counts once; what goes between the copies is sums of gradients alone."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from ling_kernels.model import Ling
from ling_kernels.ops.grad_norm import grad_norm
from ling_kernels.parallel.shares import Shares
from ling_kernels.train.optimizer import clipped_step, make_optimizer, to_masters
from tests.ranks import ranks_of, run
from tests.training import tiniest

WORLD, ROWS = 4, 4
CONFIG = replace(tiniest(), num_nextn_predict_layers=1, vocab_size=64)
WAYS = [  # optimizer, masters, the division
    ("adamw", "fp32", dict(copies=2, ep=2, vocab=2)),
    ("adamw", "fp32", dict(copies=4)),
    ("adamw8bit", "bf16", dict(copies=2, ep=2)),
    ("muon", "bf16", dict(copies=2)),
]


def model_of(masters: str) -> Ling:
    model = Ling(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    to_masters(model, masters)
    return model


def backward(model: Ling, step: int, rows: slice) -> None:
    """Of some of the step's rows, as their share of the global loss."""
    ids = torch.randint(0, CONFIG.vocab_size, (ROWS, 16), generator=torch.Generator().manual_seed(step))[rows]
    with torch.autocast("cpu", torch.bfloat16, enabled=model.lm_head.weight.dtype == torch.bfloat16):
        loss = model(ids, labels=ids, logits=False, target_counts=[ROWS * 15, ROWS * 14], z_loss=len(ids) / ROWS).loss
    loss.backward()


def counting(patch: pytest.MonkeyPatch, group) -> dict[str, int]:
    """Elements of the messages over a group, by operation, from now on."""
    found: dict[str, int] = {}

    def count(name: str) -> None:
        genuine = getattr(dist, name)

        def counted(t, *args, **options):
            if options.get("group") is group:
                found[name] = found.get(name, 0) + t.numel()
            return genuine(t, *args, **options)

        patch.setattr(dist, name, counted)

    for name in ("reduce", "all_reduce", "broadcast", "all_to_all_single"):
        count(name)
    return found


def steps_of_copies(way, rank, group):
    kind, masters, division = way
    model = model_of(masters)
    alone = copy.deepcopy(model)
    ranks = ranks_of(group).arranged(**division)
    shares = Shares(model, ranks)
    optimizer = make_optimizer(model, kind, 1e-3, 0.1, seed=7)
    of_one = make_optimizer(alone, kind, 1e-3, 0.1, seed=7)
    for step in range(3):
        with pytest.MonkeyPatch.context() as patch:
            found = counting(patch, ranks.equals)
            with shares.sums_in_backward():
                backward(model, step, slice(rank, rank + 1))
            shares.sum_gradients_()
            norm = shares.norm()
            clipped_step(optimizer, 1e-3, norm, 0.1, torch.tensor(True))
            shares.spread_weights_()
            model.balance_(0.0)
        owned = sum(p.numel() for name, p in model.named_parameters() if shares.owns(name))
        assert found == dict(all_reduce=owned)  # a gradient once, and no weight
        same_in_every_copy(model, optimizer, ranks)
        for micro in range(WORLD):
            backward(alone, step, slice(micro, micro + 1))
        whole = grad_norm([p.grad for p in alone.parameters()])
        assert norm > 0.1 and abs(norm / whole - 1) < (2e-2 if masters == "bf16" else 1e-5), (norm, whole)
        clipped_step(of_one, 1e-3, whole, 0.1, torch.tensor(True))
        of_one.zero_grad()
        optimizer.zero_grad()
        alone.balance_(0.0)
    if masters == "fp32":
        named = dict(alone.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, shares.part_of(name).take(named[name]), rtol=1e-4, atol=1e-5)


def same_in_every_copy(model, optimizer, ranks):
    number = dist.get_world_size(ranks.equals)
    tensors = [p.detach() for p in model.parameters()]
    tensors += [t for p in model.parameters() for t in optimizer.state.get(p, {}).values()]
    for t in tensors:
        bits = t.contiguous().view(-1).view(torch.uint8)
        theirs = [torch.empty_like(bits) for _ in range(number)]
        dist.all_gather(theirs, bits, group=ranks.equals)
        assert all(torch.equal(bits, other) for other in theirs)


def test_copies_have_the_same_bits(tmp_path):
    run(tmp_path, [partial(steps_of_copies, way) for way in WAYS], WORLD)
