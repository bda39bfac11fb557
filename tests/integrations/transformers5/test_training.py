"""A few steps by the Trainer, and by accelerate with FSDP2 in two processes."""

import copy
import os
from functools import partial
from multiprocessing import set_forkserver_preload

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from ling_kernels.integrations.transformers import Balance, LingForCausalLM, LingHfConfig
from tests.integrations.official import TOLERANCE, checkpoint, expected
from tests.ranks import run

CONFIG = LingHfConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
    moe_intermediate_size=16, num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.1, pad_token_id=0, eos_token_id=1,
)  # fmt: skip


def text(rows=8, length=16):
    """Rows of which each token is the one before plus 3."""
    return (torch.arange(rows)[:, None] * 7 + torch.arange(length) * 3) % 94 + 2


def build():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG))


def arguments(folder, **kwargs):
    return TrainingArguments(
        output_dir=folder, max_steps=10, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer(tmp_path, options):
    rows = [dict(input_ids=row, labels=row) for row in text()]
    model = build()
    trainer = Trainer(
        model, arguments(tmp_path, gradient_accumulation_steps=2, **options), train_dataset=rows,
        eval_dataset=rows, callbacks=[Balance(0.01)],
    )  # fmt: skip
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 10 and 4 < losses[0] < 5.5 and losses[-1] < losses[0] - 1
    assert trainer.evaluate()["eval_loss"] < losses[0] - 1
    gate = model.model.layers[1].mlp.gate
    assert 0.005 < gate.expert_bias.abs().max() <= 0.1 + 1e-6 and not gate.counts.any()  # ten moves of 0.01
    trainer.save_model(tmp_path / "saved")
    again = LingForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def steps(model, optimizer, rows, accelerator=None):
    losses = []
    for _ in range(3):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def as_started(rank):
    """What torchrun tells a process."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}


def accelerate_fsdp2(rank, group):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    as_started(rank)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP  # which accelerate chooses on a GPU only
    accelerator.state.fsdp_plugin = plugin
    model = build()
    alone = copy.deepcopy(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    assert "DTensor" in type(next(model.parameters())).__name__
    rows = text()
    losses = steps(model, optimizer, rows[rank::2], accelerator)
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, steps(alone, torch.optim.SGD(alone.parameters(), lr=0.5), rows), **TOLERANCE)
    assert losses[2] < losses[0]


def expert_parallel(folder, rank, group):
    """FSDP2 and expert parallelism of transformers itself: each rank has half of the experts and one row."""
    as_started(rank)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2, ep_size=2)
    ).train()
    assert model.model.layers[1].mlp.experts.gate_up_proj.to_local().shape[0] == 8
    want = expected("base")
    ids = want["input_ids"][rank : rank + 1]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, want["logits"][rank : rank + 1], **TOLERANCE)
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for m, rows in ((model.train(), ids), (alone.train(), want["input_ids"])):
        m(input_ids=rows, labels=rows).loss.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, **TOLERANCE, msg=name)


def test_two_processes(tmp_path):
    set_forkserver_preload([__name__])  # imported once, not by each process
    folder = tmp_path / "base"
    folder.mkdir()
    run(tmp_path, [accelerate_fsdp2, partial(expert_parallel, checkpoint("base", folder))])
