"""python -m benchmarks.studies.merging: merged, last and decayed weights of a constant-rate run, three seeds, on a CPU.

A small model trains at a constant rate. Its end is compared with merges of the weights of the last steps, by the
trainer's running merge (train/running_merge.py), and with a decay by 1-sqrt over the same steps from the same weights.
Writes results/merging.json and docs/recipe-merging.png.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ling_kernels.commands import command
from ling_kernels.files import atomic_write, origin
from ling_kernels.model import load_model
from ling_kernels.parallel.checkpoints import own_pieces
from ling_kernels.train import Settings, Trainer
from ling_kernels.train.merge import named_weights
from ling_kernels.train.running_merge import RunningMerge

RESULTS = Path(__file__).parent / "results/merging.json"
PLOT = Path(__file__).parents[2] / "docs/recipe-merging.png"
SEEDS = (0, 1, 2)
STEPS, EVERY, NUMBERS = 300, 8, (4, 8)
WEIGHTS = ("mean", "1-sqrt", "ema:0.2")


def settings(seed: int, **more) -> Settings:
    common: dict[str, Any] = dict(
        model="tiny", mtp=0, layers=2, hidden=48, experts=8, topk=2, seq_len=64, batch=8, lr=4e-3, warmup=20,
        steps=STEPS, eval_rows=128, threads=1, seed=seed, keep=0,
    )  # fmt: skip
    return Settings(**common | more)


def study(seed: int, folder: Path, steps: int = STEPS) -> dict[str, float]:
    """Validation losses of each end of one run."""
    window = (max(NUMBERS) - 1) * EVERY
    trainer = Trainer(settings(seed, steps=steps), folder / "run")
    merges = {
        (name, n): RunningMerge(settings(seed, steps=steps, merge_last=n, merge_every=EVERY, merge_weights=name))
        for name in WEIGHTS
        for n in NUMBERS
    }
    while trainer.progress.step < steps:
        trainer.step()
        step = trainer.progress.step
        for merging in merges.values():
            if merging.due(step):
                merging.add(step, own_pieces(trainer.shares))
        if step == steps - window:
            trainer.save()
    losses = {"last": trainer.evaluate()["val_loss"]}
    for (name, n), merging in merges.items():
        out = folder / f"{name.replace(':', '-')}-{n}"
        merging.write(out, trainer.shares, trainer.tokenizer, torch.float32)
        trainer.model.load_state_dict(load_model(out, dtype=next(trainer.model.parameters()).dtype).state_dict())
        losses[f"{name}, {n}"] = trainer.evaluate()["val_loss"]
    trainer.lock.close()
    decayed = Trainer.resume(folder / f"run/checkpoints/step-{steps - window:06d}", decay="1-sqrt", decay_steps=window)
    while decayed.progress.step < steps:
        decayed.step()
    losses["decayed"] = decayed.evaluate()["val_loss"]
    decayed.lock.close()
    return losses


def draw(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    names = list(rows[0]["losses"])
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        axes.plot(range(len(names)), [row["losses"][n] for n in names], "o", label=f"seed {row['seed']}")
    axes.set_xticks(range(len(names)), [n.replace(", ", "\nof ") for n in names])
    axes.set(ylabel="validation loss, nats per token", xlabel="weights at the end: the last, merged, decayed")
    axes.legend()
    figure.savefig(PLOT, dpi=110)


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            rows.append(dict(seed=seed, losses=study(seed, Path(folder) / str(seed))))
            print(json.dumps(rows[-1]), flush=True)
    about = dict(steps=STEPS, every=EVERY, weights={n: named_weights(n, max(NUMBERS)) for n in WEIGHTS})
    with atomic_write(RESULTS) as partial:
        partial.write_text(json.dumps(origin() | about | dict(rows=rows), indent=1) + "\n")
    draw(rows)
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
