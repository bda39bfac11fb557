"""python -m benchmarks.studies.rl: reinforcement learning on the toy tasks, three seeds of each, on a CPU.

Each seed teaches a tiny model the task's format, then trains it with LPO. Writes results/rl.json beside this file, the
picture docs/posttraining-rl.png and the table of docs/posttraining.md. `--plot` draws again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import fill, table
from ling_kernels.commands import command
from ling_kernels.files import atomic_write, origin
from ling_kernels.posttrain import TASKS, Loop, LoopSettings
from ling_kernels.posttrain.start import make_start

RESULTS = Path(__file__).parent / "results/rl.json"
PAGE = Path(__file__).parents[2] / "docs/posttraining.md"
PICTURE = PAGE.with_name("posttraining-rl.png")
SEEDS = (0, 1, 2)
START_STEPS = dict(sorting=500, arithmetic=500)  # of the trainer: few, so that the answers are often wrong
LR = 2e-4
KEPT = ("reward", "answer_tokens", "undecided", "clipped", "mismatch_max", "grad_norm")


def study(task: str, seed: int, steps: int, start_steps: int) -> dict:
    """One run: the start's and the loop's seconds, and the kept figures of each step."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        model = make_start(Path(folder) / "start", TASKS[task], start_steps, seed)
        between = time.perf_counter()
        settings = LoopSettings(task=task, steps=steps, seed=seed, lr=LR, device="cpu")
        loop = Loop(settings, model, Path(folder) / "run")
        records = [loop.step() for _ in range(steps)]
        loop.close()
    seconds = dict(start=between - begin, loop=time.perf_counter() - between)
    return dict(task=task, seed=seed, start_steps=start_steps, seconds=seconds,
                steps=[{name: r[name] for name in KEPT} for r in records])  # fmt: skip


def quarters(run: dict) -> tuple[float, float, float]:
    """Mean reward of the first and of the last quarter of the steps, and the larger of their standard deviations."""
    rewards = [step["reward"] for step in run["steps"]]
    n = len(rewards) // 4
    first, last = rewards[:n], rewards[-n:]
    return statistics.mean(first), statistics.mean(last), max(statistics.stdev(first), statistics.stdev(last))


def rows(runs: Sequence[dict]) -> str:
    head = "task | seed | first quarter | last quarter | larger standard deviation of the two | gain over it"
    lines = []
    for run in runs:
        first, last, spread = quarters(run)
        lines.append((run["task"], run["seed"], f"{first:.3f}", f"{last:.3f}", f"{spread:.3f}",
                      f"{(last - first) / spread:.2f}"))  # fmt: skip
    return "\n" + "\n".join(table(head, lines))


def draw(runs: Sequence[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [*dict.fromkeys(run["task"] for run in runs)]
    size = (4.6 * len(tasks), 5.6)
    figure, grid = plt.subplots(2, len(tasks), figsize=size, layout="constrained", squeeze=False, sharex=True)
    for column, task in zip(grid.T, tasks, strict=True):
        for run, color in zip([r for r in runs if r["task"] == task], ("#2a6fbb", "#d1495b", "#3a9a5f"), strict=False):
            for axes, name in zip(column, ("reward", "mismatch_max"), strict=True):
                values = [step[name] for step in run["steps"]]
                axes.plot(range(1, len(values) + 1), values, color=color, linewidth=1.2, label=f"seed {run['seed']}")
        column[0].set(ylabel="mean reward", ylim=(0, 1))
        column[1].set(xlabel="step", ylabel="largest |trainer - engine|, nats", yscale="log")
        column[0].set_title(task, loc="left", fontsize=10)
        column[0].legend(frameon=False, fontsize=9)
        for axes in column:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.rl", description=__doc__.split("\n\n")[0])
    parser.add_argument("--plot", action="store_true", help="draw the picture and the table again")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="steps of each run (40)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not flags.plot:
        runs = []
        for task, start_steps in START_STEPS.items():
            for seed in SEEDS:
                runs.append(study(task, seed, flags.steps, start_steps))
                first, last, spread = quarters(runs[-1])
                print(f"{task}, seed {seed}: {first:.3f} -> {last:.3f}, spread {spread:.3f}", flush=True)
        with atomic_write(RESULTS) as partial:
            partial.write_text(json.dumps(dict(origin=origin(), runs=runs), indent=1) + "\n")
    found = json.loads(RESULTS.read_text())["runs"]
    fill(PAGE, {"rl-study": rows(found)})
    draw(found, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
