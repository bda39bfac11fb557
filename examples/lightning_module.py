"""Train a Ling model with Lightning.

pip install '.[examples]'
python examples/lightning_module.py
"""

import torch

try:
    import lightning
except ModuleNotFoundError as error:
    raise SystemExit(f"error: this example needs the package {error.name}: pip install '.[examples]'") from None

from ling_kernels.model import Ling, LingConfig


class LingModule(lightning.LightningModule):
    def __init__(self, ling: Ling, lr: float = 3e-3, balance_rate: float = 1e-3):
        super().__init__()
        self.ling, self.lr, self.balance_rate = ling, lr, balance_rate
        self.losses = []

    def training_step(self, ids, _):
        loss = self.ling(ids, labels=ids, logits=False, z_loss=3.5e-6).loss  # labels are not shifted
        self.losses.append(loss.item())
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.ling.balance_(self.balance_rate)  # the bias of each expert, towards an even load

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


text = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 40
rows = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)
ling = Ling(LingConfig.tiny())
ling.init_weights(torch.Generator().manual_seed(0))
module = LingModule(ling)
trainer = lightning.Trainer(
    max_steps=20, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True))
losses = module.losses
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
