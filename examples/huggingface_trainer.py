"""Train a Ling model with the Trainer of transformers 5.

    pip install '.[examples]'
    python examples/huggingface_trainer.py

The model is of transformers' own kind, over our ops; the callback moves the bias of the experts. `lr_scheduler_type`,
`bf16`, gradient accumulation, FSDP and the rest work as for any model.
"""

import torch

try:
    import accelerate  # noqa: F401 (the Trainer needs it)
    from transformers import Trainer, TrainingArguments, set_seed
except ModuleNotFoundError as error:
    raise SystemExit(f"error: this example needs the package {error.name}: pip install '.[examples]'") from None

from ling_kernels.integrations.transformers import Balance, LingForCausalLM, LingHfConfig

text = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 40
ids = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)
rows = [dict(input_ids=row, labels=row) for row in ids]  # the model shifts labels by itself; -100 is ignored

set_seed(0)
model = LingForCausalLM(
    LingHfConfig(
        vocab_size=320, hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, n_group=4,
        topk_group=2, num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.1, pad_token_id=0, eos_token_id=1,
    )
)  # fmt: skip
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="huggingface_trainer", max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=5, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=rows,
    callbacks=[Balance(rate=1e-3)],
)  # fmt: skip
trainer.train()
losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
# trainer.save_model("folder") writes the published keys, for vLLM, transformers and ling_kernels.
