"""8-bit AdamW and FP8 layers with parameters that FSDP2 shards over two processes."""

from dataclasses import replace
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.train.optimizer import AdamW8bit, make_optimizer
from tests.ranks import group_of_one, run
from tests.test_fp8_training import WHOLE
from tests.training import train

CONFIG = replace(
    WHOLE, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_attention_heads=8,
    num_key_value_heads=4, num_nextn_predict_layers=0, num_experts=4,
)  # fmt: skip


def on_mesh(test, folder, rank, group):
    test(folder, init_device_mesh("cpu", (group.size(),)))


def fp8_model(mesh=None, **options):
    model = Ling(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    to_fp8(model.train(), **options)
    for module in [*model.layers, *model.mtp, model] if mesh else []:
        fully_shard(module, mesh=mesh)
    return model, make_optimizer(model, "adamw8bit", 1e-2, 0.1)


def moments_dtype(name):
    return torch.float32 if name.startswith(("word_embeddings", "lm_head")) else torch.uint8


def compare_with_one(folder, mesh):
    """Both processes have the same rows, so that the mean gradient equals a single process's: all bits are equal."""
    alone = fp8_model(weights="kept")
    sharded = fp8_model(mesh, weights="kept")
    losses = [train(*of, 2) for of in (alone, sharded)]
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
    for (name, p), q in zip(alone[0].named_parameters(), sharded[0].parameters(), strict=True):
        assert torch.equal(p, q.full_tensor()), name
        states = alone[1].state[p], sharded[1].state[q]
        assert set(states[0]) == set(states[1])
        for key, value in states[0].items():
            other = states[1][key]
            assert torch.equal(value.flatten(), (other if key == "step" else other.full_tensor()).flatten()), key
        if p.ndim > 1:
            m = states[1]["m"].to_local()
            assert m.dtype == moments_dtype(name) and m.numel() == p.numel() // 2
    optimizer = sharded[1]
    dcp.save(get_optimizer_state_dict(sharded[0], optimizer) | dict(weights=sharded[0].state_dict()),
             checkpoint_id=folder / "saved")  # fmt: skip
    if mesh.get_rank() == 0:
        torch.save(dict(losses=train(*alone, 1)), folder / "next.pt")
    assert train(*resumed(folder, mesh), 1) == train(*sharded, 1)


def resumed(folder, mesh):
    model, optimizer = fp8_model(mesh, weights="kept")
    for p in model.parameters():
        nn.init.zeros_(p)
    state = get_optimizer_state_dict(model, optimizer) | dict(weights=model.state_dict())
    dcp.load(state, checkpoint_id=folder / "saved")
    model.load_state_dict(state.pop("weights"))
    set_optimizer_state_dict(model, optimizer, state)
    for name, p in model.named_parameters():
        assert p.ndim < 2 or optimizer.state[p]["m"].dtype == moments_dtype(name)
    return model, optimizer


def go_on_in_one(folder, mesh):
    assert train(*resumed(folder, mesh), 1) == torch.load(folder / "next.pt")["losses"]


def round_at_random(folder, mesh):
    """bf16 masters: random bits differ between shards, are equal in equal runs, and continue after a resume."""

    def new(shape=(6, 256)):
        torch.manual_seed(0)
        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        nn.init.ones_(layer.weight)
        fully_shard(layer, mesh=mesh)
        return layer, AdamW8bit(layer.parameters(), 2**-9, seed=7)

    def step(layer, optimizer, inner=256):
        layer(torch.ones(4, inner, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return layer.weight.full_tensor()

    runs = [new() for _ in range(3)]
    after = [step(*run) for run in runs[:2]]
    assert torch.equal(*after) and len(after[0].unique()) == 2
    assert not torch.equal(after[0][:3], after[0][3:])
    runs[2][0].load_state_dict(runs[1][0].state_dict())
    runs[2][1].load_state_dict(runs[1][1].state_dict())
    assert torch.equal(*(step(*run) for run in runs[1:]))
    scale = runs[2][1].state[runs[2][0].weight]["m_scale"]
    assert scale.dtype == torch.float32 and tuple(scale.shape) == (6, 1)
    try:
        step(*new((6, 128)), 128)
    except ValueError as error:
        assert "multiple of 256" in str(error)
    else:
        raise AssertionError("a block of 256 would lie in two rows")


def test_two_processes_and_then_one(tmp_path):
    """A state that two processes have saved continues in one."""
    run(tmp_path, [partial(on_mesh, test, tmp_path) for test in (compare_with_one, round_at_random)])
    (tmp_path / "store").unlink(missing_ok=True)
    with group_of_one(tmp_path):
        go_on_in_one(tmp_path, init_device_mesh("cpu", (1,)))


def test_state_dict_keeps_its_precisions():
    """torch's own load_state_dict casts floating-point state to the parameter's dtype."""
    p = nn.Parameter(torch.ones(2, 256, dtype=torch.bfloat16))
    p.grad = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizers = [AdamW8bit([p], 0.0) for _ in range(2)]
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    states = [o.state[p] for o in optimizers]
    assert all(torch.equal(states[0][k], v) and states[0][k].dtype == v.dtype for k, v in states[1].items())
    assert not torch.equal(states[1]["m_scale"], states[1]["m_scale"].bfloat16().float())
    optimizers[0].step()
    assert not torch.equal(states[0]["m_scale"], states[1]["m_scale"]), "a state that was loaded is another tensor"
