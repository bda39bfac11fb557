"""python -m ling_kernels.plan ladder: the loss of a model, predicted from a ladder of smaller ones (the wind tunnel of
arXiv 2510.22115, section 2.3.3).

Each rung is a model of one hidden size; its other sizes follow, its tokens are `share` times those for which Ling's
laws (train/scaling.py) call it the best model, and learning rate and batch are those of the laws, too. All rungs but
the largest are trained with every seed; a power law of their losses predicts the largest one's, which --held-out
trains as well, to compare. OUT/ladder.json has the losses and OUT/ladder.png the plot; a run that is there already is
not trained again, and one that was stopped goes on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..commands import Parser, command
from ..errors import InputError
from ..files import atomic_write, origin, read_json, user_path
from ..train import Trainer, scaling
from ..train.checkpoint import list_checkpoints
from ..train.flags import add_flags
from ..train.prepare.models import model_config
from ..train.settings import Settings, settings_of, to_json
from .power_law import PowerLaw, predict

FILE = "ladder.json"
SHARE = 0.9  # of the interval
FREE = {"threads", "save_every", "keep", "keep_every", "log_every"}  # settings that change no loss


@dataclass(frozen=True)
class Rung:
    hidden: int
    settings: Settings
    flops: float  # per token
    tokens: int

    @property
    def compute(self) -> float:
        return self.flops * self.tokens


def plan_ladder(options: dict, hidden: Sequence[int], share: float = 1.0) -> list[Rung]:
    """The rungs, smallest first. options: settings that all have; batch, steps and lr among them override the laws."""
    if len(set(hidden)) != len(hidden) or len(hidden) < 4:
        raise InputError(f"--hidden {' '.join(map(str, hidden))}: a ladder has four different sizes or more")
    if not 0 < share:
        raise InputError(f"--share {share:g}: it must be more than 0")
    rungs = []
    for size in sorted(hidden):
        values = options | dict(hidden=size)
        s = settings_of(values)
        flops = scaling.flops_per_token(model_config(s)[0], s.seq_len)
        tokens = share * scaling.best_tokens(scaling.compute_of_model(flops))
        rows = values.get("batch") or max(1, round(scaling.batch_tokens(flops * tokens) / s.seq_len))
        steps = values.get("steps") or max(1, round(tokens / (rows * s.seq_len)))
        lr = values.get("lr") or float(f"{scaling.peak_lr(flops * steps * rows * s.seq_len):.3g}")
        settings = settings_of(values | dict(batch=rows, steps=steps, lr=lr))
        rungs.append(Rung(size, settings, flops, steps * rows * s.seq_len))
    return rungs


def table(rungs: Sequence[Rung], seeds: Sequence[int]) -> list[str]:
    lines = ["hidden  FLOPs/token       tokens    steps  rows        lr    FLOPs of a run"]
    for r in rungs:
        s = r.settings
        lines.append(f"{r.hidden:>6}  {r.flops:>11.4g} {r.tokens:>12,} {s.steps:>8,} {s.batch:>5} {s.lr:>9.3g}"
                     f" {r.compute:>17.4g}")  # fmt: skip
    below, largest = sum(r.compute for r in rungs[:-1]) * len(seeds), rungs[-1].compute
    lines.append(f"{len(seeds)} seeds of all but the largest take {below / largest:.3g} times the FLOPs of the largest")
    return lines


def train_rung(rung: Rung, seed: int, folder: Path) -> float:
    """The validation loss of a run, which is resumed where it has a checkpoint."""
    if list_checkpoints(folder):
        trainer = Trainer.resume(folder)
    else:
        options = {f: getattr(rung.settings, f) for f in Settings.__dataclass_fields__} | dict(seed=seed)
        trainer = Trainer(Settings(**options), folder, restart=True)
    every = trainer.settings.save_every
    while trainer.progress.step < trainer.settings.steps:
        trainer.step()
        if every and trainer.progress.step % every == 0:
            trainer.save()
    if trainer.lock:
        trainer.lock.close()
    return trainer.evaluate()["val_loss"]


def train_ladder(rungs: Sequence[Rung], seeds: Sequence[int], out: Path, held_out: bool) -> list[dict]:
    """Train what OUT/ladder.json does not have yet: rows of hidden, seed, compute and loss."""
    before = read_json(out / FILE) if (out / FILE).is_file() else {}
    rows, settings = before.get("runs", []), settings_there(rungs, before.get("settings", {}), out)
    write(out, rows, dict(settings=settings))
    done = {(row["hidden"], row["seed"]) for row in rows}
    for rung in rungs if held_out else rungs[:-1]:
        for seed in seeds:
            if (rung.hidden, seed) not in done:
                loss = train_rung(rung, seed, out / f"hidden-{rung.hidden}-seed-{seed}")
                rows.append(dict(hidden=rung.hidden, seed=seed, compute=rung.compute, tokens=rung.tokens, loss=loss))
                print(f"hidden {rung.hidden}, seed {seed}: {loss:.4f} nats", flush=True)
                write(out, rows, dict(settings=settings))
    asked = {(rung.hidden, seed) for rung in rungs for seed in seeds}
    return [row for row in rows if (row["hidden"], row["seed"]) in asked]


def settings_there(rungs: Sequence[Rung], before: dict[str, dict], out: Path) -> dict[str, dict]:
    """The settings of the rungs in OUT by hidden size, with those of new ones. Raises InputError where a rung that is
    there has others: its runs are not those that are asked for."""
    now = {str(rung.hidden): to_json(rung.settings) for rung in rungs}
    for hidden in filter(before.__contains__, now):
        for name, value in now[hidden].items():
            if name not in FREE and (old := before[hidden].get(name, value)) != value:
                raise InputError(f"{out} holds hidden {hidden} with {name} {old}, not {value}: name another --out")
    return before | now


def write(out: Path, rows: list[dict], more: dict) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / FILE) as partial:
            partial.write_text(json.dumps(more | dict(origin=origin(), runs=rows), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out / FILE}: {error.strerror or error}") from None


def conclude(rungs: Sequence[Rung], rows: list[dict]) -> dict:
    """The law of the smaller rungs, its prediction of the largest one's loss, and the error where that was trained."""
    largest = rungs[-1]
    below = [row for row in rows if row["hidden"] != largest.hidden]
    law, loss, interval = predict([r["compute"] for r in below], [r["loss"] for r in below], largest.compute, SHARE)
    result = dict(floor=law.floor, a=law.a, b=law.b, at=largest.compute, predicted=loss, interval=interval, share=SHARE)
    found = [row["loss"] for row in rows if row["hidden"] == largest.hidden]
    if found:
        mean = sum(found) / len(found)
        result |= dict(measured=mean, error=loss / mean - 1)
    return result


def lines_of(result: dict) -> list[str]:
    low, high = result["interval"]
    lines = [f"L(C) = {result['floor']:.4f} + {result['a']:.4g} C^-{result['b']:.4f}",
             f"predicted at {result['at']:.4g} FLOPs: {result['predicted']:.4f} nats,"
             f" {100 * result['share']:.0f} % of runs from {low:.4f} to {high:.4f}"]  # fmt: skip
    if "measured" in result:
        lines.append(f"measured, mean of the seeds: {result['measured']:.4f}; the prediction is"
                     f" {100 * result['error']:+.2f} % off")  # fmt: skip
    return lines


def draw(rows: Sequence[dict], result: dict, path: Path) -> bool:
    """Plot losses, law and prediction; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    import numpy as np

    law = PowerLaw(result["floor"], result["a"], result["b"])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    below = [row for row in rows if row["compute"] != result["at"]]
    largest = [row for row in rows if row["compute"] == result["at"]]
    x = np.geomspace(min(row["compute"] for row in rows), result["at"], 200)
    axes.plot(x, [law(c) for c in x], color="0.5", label="power law of the smaller ones")
    axes.plot([r["compute"] for r in below], [r["loss"] for r in below], "o", ms=4, label="trained, each seed")
    if largest:
        axes.plot([r["compute"] for r in largest], [r["loss"] for r in largest], "s", ms=4, label="held out, each seed")
    low, high = result["interval"]
    axes.errorbar([result["at"] * 1.04], [result["predicted"]], [[result["predicted"] - low],
                  [high - result["predicted"]]], fmt="x", color="black", capsize=4, label="predicted")  # fmt: skip
    axes.set(xscale="log", xlabel="FLOPs of a run", ylabel="validation loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=110)
    return True


def parser() -> Parser:
    flags = Parser(
        "python -m ling_kernels.plan ladder", usage="%(prog)s --hidden N N N N --out OUT [flags]",
        description=(__doc__ or "").partition("\n\n")[2],
    )  # fmt: skip
    flags.add_argument("--hidden", type=int, nargs="+", required=True, metavar="N", help="hidden sizes, four or more")
    flags.add_argument("--share", type=float, default=1.0, metavar="X", help="of the laws' tokens (default: 1)")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    flags.add_argument("--held-out", action="store_true", help="train the largest, too (default: only predict it)")
    flags.add_argument("--plan", action="store_true", help="print the rungs and stop")
    flags.add_argument("--out", type=Path, metavar="OUT", help="the folder of the runs")
    add_flags(flags, without=("hidden", "seed"))
    return flags


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(argv))
    own = {name: options.pop(name) for name in ("hidden", "share", "seeds", "held_out", "plan", "out")}
    rungs = plan_ladder(options, own["hidden"], own["share"])
    print(*table(rungs, own["seeds"]), sep="\n", flush=True)
    if own["plan"]:
        return 0
    if len(set(own["seeds"])) != len(own["seeds"]) or min(own["seeds"]) < 0:
        raise InputError(f"--seeds {' '.join(map(str, own['seeds']))}: they are different numbers of at least 0")
    if own["out"] is None:
        raise InputError("--out is missing: name a folder for the runs, or give --plan")
    out = user_path(own["out"])
    rows = train_ladder(rungs, own["seeds"], out, own["held_out"])
    result = conclude(rungs, rows)
    there = read_json(out / FILE)
    write(out, there["runs"], there | dict(result=result))
    print(*lines_of(result), sep="\n")
    if draw(rows, result, out / "ladder.png"):
        print(f"plot {out / 'ladder.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
