"""python -m benchmarks.studies.balance: balancing rules of the router's bias compared, three seeds, on a CPU.

    none        no bias
    sign        b += rate * sign(mean load - load)                                  (arXiv 2408.15664)
    zero mean   the same minus its mean over the experts, Ling-2.0's rule and the trainer's
    quantile    each expert's bias is what gives it an even share of the step's tokens: the topk / experts quantile
                of (a token's first score that is not chosen - the expert's score), minus the mean (Kimi K3's report,
                section 2.3.3; --moe-router-load-balancing-type quantile_balancing of Megatron-LM)

The load violation of a step is the busiest expert's load over the mean, minus 1; the worst layer's and the mean of the
layers'. Writes results/balance.json and docs/recipe-balance.png.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ling_kernels.commands import command
from ling_kernels.files import atomic_write, origin
from ling_kernels.nn import Router
from ling_kernels.train import Settings, Trainer

RESULTS = Path(__file__).parent / "results/balance.json"
PLOT = Path(__file__).parents[2] / "docs/recipe-balance.png"
SEEDS = (0, 1, 2)
STEPS, LAST, RATE = 150, 50, 1e-2


def settings(seed: int, steps: int) -> Settings:
    return Settings(
        model="tiny", mtp=0, layers=3, hidden=48, experts=16, topk=4, groups=1, seq_len=64, batch=8, lr=4e-3, warmup=20,
        steps=steps, eval_rows=128, threads=1, seed=seed, balance_rate=RATE,
    )  # fmt: skip


def sign(router: Router, scores: Tensor) -> Tensor:
    counts = router.counts.float()
    return router.expert_bias + RATE * torch.sign(counts.mean() - counts)


def zero_mean(router: Router, scores: Tensor) -> Tensor:
    counts = router.counts.float()
    offset = torch.sign(counts.mean() - counts)
    return router.expert_bias + RATE * (offset - offset.mean())


def quantile(router: Router, scores: Tensor) -> Tensor:
    topk, experts = router.limits["topk"], len(router.expert_bias)
    biased = scores + router.expert_bias
    needed = biased.topk(topk + 1, 1).values[:, -1:] - scores  # of each token and expert: the bias to be chosen
    bias = needed.quantile(topk / experts, 0)
    return bias - bias.mean()


RULES: dict[str, Callable[[Router, Tensor], Tensor] | None] = {
    "none": None, "sign": sign, "zero mean": zero_mean, "quantile": quantile,
}  # fmt: skip


def study(rule: str, seed: int, folder: Path, steps: int = STEPS) -> dict:
    """Load violations of each step, the validation loss and the load of each layer and expert over the last steps."""
    trainer = Trainer(settings(seed, steps), folder)
    seen: dict[Router, Tensor] = {}
    for router in trainer.model.routers():
        router.register_forward_pre_hook(
            lambda r, x: seen.__setitem__(r, (x[0].detach().float() @ r.weight.detach().float().T).sigmoid())
        )

    def balance(rate: float) -> None:
        for router in trainer.model.routers():
            if rule_of is not None and rate:
                router.expert_bias.copy_(rule_of(router, seen[router]))
            router.counts.zero_()

    rule_of = RULES[rule]
    trainer.model.balance_ = balance
    worst, mean, load = [], [], 0
    while trainer.progress.step < steps:
        record = trainer.step()
        worst.append(record["load_violation_max"])
        mean.append(record["load_violation_mean"])
        if trainer.progress.step > steps - LAST:
            load = load + trainer.details.expert_counts
    share = load / load.double().mean(1, keepdim=True)
    trainer.lock.close()
    return dict(rule=rule, seed=seed, worst=worst, mean=mean, val_loss=trainer.evaluate()["val_loss"],
                load=share.tolist())  # fmt: skip


def draw(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    axes = top.add_subplot()
    for i, rule in enumerate(RULES):
        for row in rows:
            if row["rule"] == rule:
                smooth = [sum(row["worst"][max(0, s - 9) : s + 1]) / min(s + 1, 10) for s in range(len(row["worst"]))]
                axes.plot(
                    range(1, len(smooth) + 1), smooth, color=f"C{i}", lw=1, label=rule if not row["seed"] else None
                )
    axes.set(xlabel="step", ylabel="busiest / mean - 1, worst layer,\nmean of 10 steps", ylim=(0, None))
    axes.legend()
    for ax, rule in zip(bottom.subplots(1, len(RULES)), RULES, strict=True):
        row = next(row for row in rows if row["rule"] == rule)
        image = ax.imshow(row["load"], vmin=0, vmax=2, cmap="viridis", aspect="auto")
        ax.set(title=rule, xlabel="expert", yticks=range(len(row["load"])), ylabel="MoE layer")
    bottom.colorbar(image, ax=bottom.axes, label="load / mean")
    figure.savefig(PLOT, dpi=110)


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for rule in RULES:
                rows.append(study(rule, seed, Path(folder) / f"{rule}-{seed}"))
                last = rows[-1]["worst"][-LAST:]
                print(
                    f"{rule}, seed {seed}: worst layer {sum(last) / LAST:.3f}, {rows[-1]['val_loss']:.4f}", flush=True
                )
    for row in rows:
        for name in ("worst", "mean"):
            row[name] = [round(x, 4) for x in row[name]]
        row["load"] = [[round(x, 3) for x in layer] for layer in row["load"]]
    with atomic_write(RESULTS) as partial:
        partial.write_text(json.dumps(origin() | dict(steps=STEPS, rate=RATE, rows=rows)) + "\n")
    draw(rows)
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
