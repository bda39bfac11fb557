"""Train a Ling model with the Trainer of transformers.

    pip install '.[examples]'
    python examples/huggingface_trainer.py

The Trainer wants a module whose forward returns a dict, and knows nothing of the routers: the wrapper and the callback
below are all that is missing. `lr_scheduler_type`, `bf16`, gradient accumulation and the rest work as for any model.
"""

import torch
from torch import nn

try:
    import accelerate  # noqa: F401 (the Trainer needs it)
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(f"error: this example needs the package {error.name}: pip install '.[examples]'") from None

from ling_kernels.model import Ling, LingConfig


class WithLoss(nn.Module):
    """A Ling model as the Trainer calls it: a dict with the loss, without storing the logits."""

    def __init__(self, ling: Ling):
        super().__init__()
        self.ling = ling

    def forward(self, input_ids, labels=None, attention_mask=None):
        return {"loss": self.ling(input_ids, labels, attention_mask, logits=False, z_loss=3.5e-6).loss}


class Balance(TrainerCallback):
    """Moves the bias of each expert towards an even load, once after each step of the optimizer."""

    def __init__(self, ling: Ling, rate: float = 1e-3):
        self.ling, self.rate = ling, rate

    def on_step_end(self, args, state, control, **kwargs):
        self.ling.balance_(self.rate)


text = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 40
ids = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)
rows = [dict(input_ids=row, labels=row) for row in ids]  # labels are not shifted; -100 is ignored

ling = Ling(LingConfig.tiny())
ling.init_weights(torch.Generator().manual_seed(0))
trainer = Trainer(
    WithLoss(ling),
    TrainingArguments(
        output_dir="huggingface_trainer", max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=5, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=rows,
    callbacks=[Balance(ling)],
)  # fmt: skip
trainer.train()
losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
# ling_kernels.model.save_model(ling, "folder") writes it for vLLM, transformers and ling_kernels.
