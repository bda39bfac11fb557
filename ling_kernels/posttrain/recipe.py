"""python -m ling_kernels.posttrain.recipe tiny: everything, from random weights to answers of a rewarded model.

Each part is a command of its own, which is printed, and goes on where it was stopped:

    pretrain   the stages of the recipe: pre-training, longer rows, chains of thought, merging, YaRN
    sft        supervised fine-tuning on chats, demonstrations of a toy task
    lpo        reinforcement learning on the task, with Ling's sentence-level loss

At the end the models are compared: validation nats, needles, exact match of the task by the engine's greedy answers;
with --lm-eval also tasks of lm_eval.
OUT/results.json has the numbers, OUT/recipe.png their plot.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random

from ..commands import Parser, command
from ..errors import InputError
from ..files import atomic_write, origin, read_json, user_path
from ..train.recipe import STATE, load_stages, stage_loss
from ..train.report import read_lines
from .evaluate import exact_match, lm_eval_figures
from .tasks import TASKS

EXAMPLES = 4000  # chats of the fine-tuning
FLAGS = "flags.json"  # in OUT: those that its parts depend on


def execute(module: str, flags: Sequence[str]) -> int:
    """Run a command of the package; returns its exit code."""
    print(f"\n$ python -m ling_kernels.{module} {shlex.join(flags)}", flush=True)
    return subprocess.run([sys.executable, "-m", f"ling_kernels.{module}", *flags]).returncode


def write_chats(path: Path, task: str) -> None:
    """Demonstrations of the task, where the file is not there yet."""
    if not path.is_file():
        random = Random(f"chats {task}")
        with atomic_write(path) as partial, open(partial, "w") as file:
            for p in (TASKS[task](random) for _ in range(EXAMPLES)):
                roles = dict(role="user", content=p.prompt), dict(role="assistant", content=p.demonstration)
                file.write(json.dumps(dict(messages=roles)) + "\n")


def check_flags(out: Path, args) -> None:
    """Raise InputError where OUT was begun with other flags, which its complete parts would not know of."""
    now = {name: getattr(args, name) for name in ("recipe", "task", "sft_steps", "rl_steps")}
    before = read_json(out / FLAGS) if (out / FLAGS).is_file() else now
    for name, value in now.items():
        if before.get(name) != value:
            what = name.replace("_", " ")
            raise InputError(f"{out} was begun with {what} {before.get(name)}, not {value}: give another --out")
    with atomic_write(out / FLAGS) as partial:
        partial.write_text(json.dumps(now) + "\n")


def parts(out: Path, args) -> list[tuple[str, str, list[str]]]:
    """(name, module, flags) of the commands, as they are to be run now."""
    state = read_json(out / "pretrain" / STATE) if (out / "pretrain" / STATE).is_file() else {"done": {}}
    base = out / "pretrain" / ([*state["done"].values()] or [""])[-1]
    sources = ["--source", *args.source] if args.source else []
    sft = f"--seq-len 128 --batch 4 --lr 1e-3 --warmup 10 --balance-rate 0 --eval-rows 16 --steps {args.sft_steps}"
    rl = f"--task {args.task} --method lpo --steps {args.rl_steps} --save-every 5"
    again = (out / "lpo" / "settings.json").is_file()
    return [
        ("pretrain", "train", ["--recipe", args.recipe, *sources, "--out", str(out / "pretrain"), *args.train_flags]),
        ("sft", "train", ["--model", str(base), "--data", str(out / "chats.jsonl"), *sft.split(), "--resume", "auto",
                          "--out", str(out / "sft")]),
        ("lpo", "posttrain.rl", ["--resume", str(out / "lpo"), "--steps", str(args.rl_steps)] if again else
         ["--model", str(out / "sft" / "model"), *rl.split(), "--out", str(out / "lpo")]),
    ]  # fmt: skip


def models_of(out: Path) -> dict[str, Path]:
    """The folder of the model after each part."""
    stages = read_json(out / "pretrain" / STATE)["done"]
    return dict(pretrain=out / "pretrain" / [*stages.values()][-1], sft=out / "sft/model", lpo=out / "lpo/model")


def results(out: Path, task: str, problems: int) -> dict:
    """Numbers of the models after each part."""
    state = read_json(out / "pretrain" / STATE)
    matches = {name: exact_match(folder, task, problems) for name, folder in models_of(out).items()}
    losses = {name: stage_loss(out / "pretrain", name, state) for name in state["stages"]}
    losses["sft"] = stage_loss(out, "sft", {"done": {}})
    nats = {name: loss for name, loss in losses.items() if loss is not None}
    rewards = [row["reward"] for row in read_lines(out / "lpo/metrics.jsonl")]
    examples = {name: rows[:3] for name, (_, rows) in matches.items()}
    return dict(
        origin=origin(), task=task, problems=problems, nats=nats, needles=state.get("needles", {}), rewards=rewards,
        exact_match={name: share for name, (share, _) in matches.items()}, examples=examples,
    )  # fmt: skip


def lines_of(found: dict) -> list[str]:
    lines = [f"{name:<16} {nats:.4f} nats of what its sources held out" for name, nats in found["nats"].items()]
    for rows in found["needles"].values():
        lines += [
            f"needles          {r['length']:,} tokens: {sum(r['found']) / len(r['found']):.2f} found" for r in rows
        ]
    lines += [f"exact match      {share:.3f} of {found['problems']} problems of {found['task']}, after {name}"
              for name, share in found["exact_match"].items()]  # fmt: skip
    for name, tasks in found.get("lm_eval", {}).items():
        lines += [f"lm_eval          {task} {metric} {value:.4f}, after {name}"
                  for task, row in tasks.items() for metric, value in row.items()]  # fmt: skip
    for prompt, answer, right in found["examples"]["lpo"]:
        lines.append(f"  {prompt!r} -> {answer!r}, right: {right!r}")
    return lines


def draw(out: Path, found: dict) -> bool:
    """Plot the training losses of all parts one after the other, rewards and exact match; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[3, 2, 1])
    start = 0
    for name in (*read_json(out / "pretrain" / STATE)["stages"], "sft"):
        folder = out / "sft" if name == "sft" else out / "pretrain" / name
        rows = [row for row in read_lines(folder / "metrics.jsonl") if row.get("main_loss") is not None]
        if rows:
            left.plot([start + row["step"] for row in rows], [row["main_loss"] for row in rows], lw=0.8, label=name)
            start += rows[-1]["step"]
    left.set(xlabel="steps of all stages", ylabel="training loss, nats per token")
    left.legend()
    middle.plot(range(1, len(found["rewards"]) + 1), found["rewards"])
    middle.set(xlabel="steps of LPO", ylabel=f"mean reward, {found['task']}")
    right.bar([*found["exact_match"]], [*found["exact_match"].values()])
    right.set(ylabel="exact match", ylim=(0, 1))
    figure.savefig(out / "recipe.png", dpi=110)
    return True


@command
def main(argv: Sequence[str] | None = None) -> int:
    flags = Parser(
        "python -m ling_kernels.posttrain.recipe", description=(__doc__ or "").partition(": ")[2],
        usage="%(prog)s RECIPE [flags] [-- flags of python -m ling_kernels.train for all stages of the pre-training]",
    )  # fmt: skip
    flags.add_argument("recipe", help="of python -m ling_kernels.train --recipe: tiny, or a folder of stages")
    flags.add_argument("--source", nargs="+", metavar="NAME=PATH", help="the data of its sources (default: tiny's own)")
    flags.add_argument("--task", choices=TASKS, default="sorting", help="the toy task (default: sorting)")
    flags.add_argument("--sft-steps", type=int, default=400, metavar="N", help="steps of fine-tuning (default: 400)")
    flags.add_argument("--rl-steps", type=int, default=30, metavar="N", help="steps of LPO (default: 30)")
    flags.add_argument("--problems", type=int, default=64, metavar="N", help="of the exact match (default: 64)")
    flags.add_argument(
        "--lm-eval", type=shlex.split, metavar="FLAGS", help="evaluate the three models by lm_eval, as with '--tasks"
        " gsm8k --limit 100': flags of python -m ling_kernels.integrations.lm_eval",
    )  # fmt: skip
    flags.add_argument("--out", metavar="OUT", help="folder of everything (default: runs/everything-NAME)")
    argv = [*(sys.argv[1:] if argv is None else argv)]
    end = argv.index("--") if "--" in argv else len(argv)
    args = flags.parse_args(argv[:end])
    args.train_flags = argv[end + 1 :]
    for name in ("sft_steps", "rl_steps", "problems"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    if args.lm_eval and find_spec("lm_eval") is None:
        raise InputError("--lm-eval: the package lm_eval is not installed (pip install 'lm_eval>=0.4.11')")
    load_stages(args.recipe)
    out = user_path(args.out or f"runs/everything-{Path(args.recipe).name}").absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_flags(out, args)
        write_chats(out / "chats.jsonl", args.task)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}") from None
    for i in range(3):
        name, module, its_flags = parts(out, args)[i]
        if name != "pretrain" and (out / name / "model" / "config.json").is_file():
            continue
        if code := execute(module, its_flags):
            if code != 2:  # bad input, which the same command has again
                print(f"{name} is not complete: the same command goes on with it", file=sys.stderr)
            return code
    found = results(out, args.task, args.problems)
    for name, folder in models_of(out).items() if args.lm_eval else ():
        there = out / "lm_eval" / name
        its_flags = ["--model_args", f"pretrained={folder}", "--output_path", str(there), *args.lm_eval]
        if code := execute("integrations.lm_eval", its_flags):
            return code
        found["lm_eval"] = found.get("lm_eval", {}) | {name: lm_eval_figures(there)}
    with atomic_write(out / "results.json") as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")
    print("", *lines_of(found), sep="\n")
    if draw(out, found):
        print(f"plot             {out / 'recipe.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
