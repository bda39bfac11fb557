"""Two expert-parallel ranks on gloo: steps of training, and checkpoints that Megatron's experts and ours read."""

from functools import partial
from pathlib import Path

import pytest
import torch

from ling_kernels.model import LingConfig, load_model
from ling_kernels.train.convert import from_dcp
from tests import ranks
from tests.integrations.megatron import cpu

pytestmark = pytest.mark.timeout(120)


def three_steps(model) -> list[float]:
    """Losses under Megatron's data parallelism, which reduces gradients and moves the balance bias."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    parallel = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        parallel.zero_grad_buffer()
        model.zero_grad()
        batch = cpu.batch(10 * step + torch.distributed.get_rank())
        loss = (parallel(**batch) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        loss.backward()
        finalize_model_grads([parallel])
        for p in parallel.parameters():
            p.grad = p.main_grad
        optimizer.step()
        losses.append(loss.item())
    return losses


def trains_as_megatron(rank, group):
    cpu.start(2)
    from ling_kernels.integrations import megatron

    config = cpu.config(ep=2, moe_router_bias_update_rate=1e-2)
    theirs = cpu.model(config)
    state = {name: t.clone() for name, t in theirs.state_dict().items() if torch.is_tensor(t)}
    batch = cpu.batch(rank)
    loss, gradients = cpu.step(theirs, batch)
    losses = three_steps(theirs)
    megatron.apply()
    ours = cpu.model(config)
    ours.load_state_dict(state)
    our_loss, our_gradients = cpu.step(ours, batch)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    cpu.close(our_gradients, gradients, 1e-5)
    our_losses = three_steps(ours)
    assert our_losses == pytest.approx(losses, rel=1e-4) and losses[0] != losses[2]
    experts = [name for name, p in ours.named_parameters() if not getattr(p, "allreduce", True)]
    assert len(experts) == 6 and all(name.rpartition(".")[2] in ("weight1", "weight2") for name in experts)
    for name, bias in ours.named_buffers():
        if name.endswith("expert_bias"):
            theirs_now = theirs.get_buffer(name)
            torch.testing.assert_close(bias.mean(), state[name].mean(), rtol=0, atol=1e-6)
            difference = bias - theirs_now  # the same for all experts
            torch.testing.assert_close(difference, difference.mean().expand(16), rtol=0, atol=1e-6)
    megatron.undo()


def saved(model, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def loaded(model, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


def saves(folder, rank, group):
    """Megatron's experts and ours with the same weights; each reads what the other has saved."""
    cpu.start(2)
    from ling_kernels.integrations import megatron

    theirs = cpu.model(cpu.config(ep=2))
    megatron.apply()
    ours = cpu.model(theirs.config)
    saved(theirs, folder / "theirs")
    loaded(ours, folder / "theirs")
    cpu.same_weights(ours, theirs)
    saved(ours, folder / "ours")
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    loaded(theirs, folder / "ours")
    cpu.same_weights(theirs, ours)
    megatron.undo()


def test_training_and_checkpoints(tmp_path, megatron):
    ranks.run(tmp_path, [trains_as_megatron, partial(saves, tmp_path)])  # both at once: processes import for seconds
    models = []
    for parts in ([], ["experts"]):  # on one rank, which reads what the other kind of experts has saved
        megatron.apply(parts)
        models.append(cpu.model(cpu.config()))
        loaded(models[-1], tmp_path / ("theirs" if parts else "ours"))
    cpu.same_weights(*models)
    assert models[0].decoder.layers[1].mlp.experts.local_experts[15].linear_fc1.weight.std() > 0.01
    same_logits(models[0], tmp_path)


def same_logits(megatron_model, folder: Path) -> None:
    """A checkpoint of Megatron, converted to the official keys, is a Ling with Megatron's logits."""
    config = LingConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        moe_intermediate_size=16, num_nextn_predict_layers=1, rope_theta=10000.0, max_position_embeddings=64,
        pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.to_json(folder / "config.json")
    from_dcp(folder / "ours", folder / "official", str(folder / "config.json"))
    ling = load_model(folder / "official", dtype=torch.float32).eval()
    batch = cpu.batch() | dict(labels=None, loss_mask=None)
    with torch.no_grad():
        logits = ling(batch["input_ids"]).logits
        torch.testing.assert_close(logits, megatron_model.eval()(**batch), rtol=1e-4, atol=1e-5)
