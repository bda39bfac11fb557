"""python -m benchmarks.study_fp8 train|measure|report: does FP8 train as bf16 does? A small Ling on a CPU.

train    Three seeds in FP8, bf16 and fp32, the first two also without QK-norm, on equal data from equal weights. fp32
         shows what bf16 itself costs. A run that has its file in --results is not made again. Every 250 steps its
         weights go to --weights.
measure  From those weights, on held-out text: underflow and distortion of every FP8 layer's operands (the trainer's own
         watch), and outputs and gradients of every layer in bf16 and FP8 against fp64.
report   The tables of docs/fp8.md and docs/fp8-study.png from --results.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.blocks import fill
from benchmarks.gpu import origin
from ling_kernels.errors import InputError, command
from ling_kernels.files import whole
from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn import MLP, Attention, Experts, Fp8Experts, MoE
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.ops.dispatch import dispatch
from ling_kernels.ops.permute import permute
from ling_kernels.ops.unpermute import unpermute
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train.data import Documents, Packed, describe, gather_tokens, hold_out
from ling_kernels.train.monitor import METRICS, FP8Monitor
from ling_kernels.train.optimizer import adamw
from ling_kernels.train.prepare import deterministic
from ling_kernels.train.settings import Settings
from ling_kernels.train.trainer import Progress, evaluate, train_step, validation_batches

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/study_fp8"
PAGE, PICTURE = ROOT / "docs/fp8.md", ROOT / "docs/fp8-study.png"
SETTINGS = Settings(steps=2000, seq_len=64, batch=4, lr=1e-3, warmup=100, eval_rows=256)
CONFIG = replace(
    LingConfig.tiny(), intermediate_size=256, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, n_group=2,
    topk_group=2, moe_intermediate_size=128, num_nextn_predict_layers=0, max_position_embeddings=64,
)  # fmt: skip
SEEDS = 0, 1, 2
RUNS = [  # precision, QK-norm, seed: what matters most comes first
    *((precision, True, seed) for seed in SEEDS for precision in ("fp8", "bf16")),
    *(
        (precision, qk_norm, seed)
        for precision, qk_norm in (("fp8", False), ("fp32", True), ("bf16", False))
        for seed in SEEDS
    ),
]
ALONG = ("x", "xt", "dy", "dyt")  # operands that QK-norm may change
KEEP = 250  # steps between the weights that are kept
WINDOW = 100  # steps that a point of the curves is the mean of
COLOURS = {"fp8": "#d1495b", "bf16": "#2a6fbb", "fp32": "#8a8f98"}


def name_of(precision: str, qk_norm: bool, seed: int) -> str:
    return f"{precision}-{'norm' if qk_norm else 'plain'}-{seed}"


def new_model(config: LingConfig, precision: str, seed: int) -> Ling:
    """In fp32, random; in FP8 also the experts' weight gradients, however few their rows are."""
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    if precision == "fp8":
        _, left = to_fp8(model, wgrad="fp8")
        assert not left, left
    return model.train()


def documents(weights: Path, config: LingConfig, settings: Settings) -> tuple[Documents, Documents, dict]:
    """To train on, held out, and what a result says of all of them."""
    docs = gather_tokens(settings.data, load_tokenizer(None), config.vocab_size, weights / "tokens.bin")
    return *hold_out(docs, settings.holdout), describe(docs)


def run(config: LingConfig, settings: Settings, precision: str, weights: Path, name: str | None = None) -> dict:
    """Train, and say what came of it: the loss of every step, and the validation loss at the end. With a name, weights
    are kept."""
    training, held_out, about = documents(weights, config, settings)
    packed = Packed(training, settings.seq_len, settings.seed)
    model = new_model(config, precision, settings.seed)
    optimizer = adamw(model, settings.lr, settings.weight_decay)
    progress, losses, start = Progress(), [], time.process_time()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    while progress.step < settings.steps:
        record, _ = train_step(model, optimizer, packed, settings, progress, dtype)
        losses.append(round(record["main_loss"], 6))
        if name and progress.step % KEEP == 0:
            (weights / name).mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), weights / name / f"{progress.step}.pt")
        if progress.step % 100 == 0:
            print(f"  step {progress.step}  loss {mean(losses[-100:]):.4f}", flush=True)
    seconds = (time.process_time() - start) / settings.steps
    val_loss = evaluate(model, validation_batches(held_out, settings), dtype)
    about = dict(data=about, skipped=progress.skipped, cpu_seconds_per_step=round(seconds, 4))
    return about | dict(val_loss=val_loss, losses=losses)


def here() -> dict:
    return origin() | dict(torch=torch.__version__, threads=torch.get_num_threads())


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_text(json.dumps(result) + "\n")


def train_all(results: Path, weights: Path, settings: Settings) -> None:
    for precision, qk_norm, seed in RUNS:
        name = name_of(precision, qk_norm, seed)
        if (results / f"{name}.json").exists():
            continue
        print(name, flush=True)
        config, mine = replace(CONFIG, use_qk_norm=qk_norm), replace(settings, seed=seed)
        about = dict(name=name, precision=precision, qk_norm=qk_norm, seed=seed) | here()
        with deterministic():
            done = run(config, mine, precision, weights, name)
        write(results / f"{name}.json", about | dict(settings=asdict(mine), config=asdict(config)) | done)


def measure_all(results: Path, weights: Path) -> None:
    losses = {qk_norm: {} for qk_norm in (True, False)}
    errors = {}
    for precision, qk_norm, seed in RUNS:
        name = name_of(precision, qk_norm, seed)
        if precision != "fp8" or not (results / f"{name}.json").exists():
            continue
        config = replace(CONFIG, use_qk_norm=qk_norm)
        packed = Packed(documents(weights, config, SETTINGS)[1], SETTINGS.seq_len, None)
        batches = [packed.batch(range(i, i + SETTINGS.batch)) for i in range(0, 4 * SETTINGS.batch, SETTINGS.batch)]
        for path in sorted((weights / name).glob("*.pt"), key=lambda p: int(p.stem)):
            state = torch.load(path)
            losses[qk_norm].setdefault(seed, {})[int(path.stem)] = operands(config, state, batches)
        if qk_norm:
            errors[seed] = layer_errors(config, state, batches[0])
        print(name, flush=True)
    write(results / "operands.json", here() | dict(norm=losses[True], plain=losses[False]))
    write(results / "gradients.json", here() | dict(errors=errors))


def operands(config: LingConfig, state: dict, batches: list) -> dict[str, dict[str, list[float]]]:
    """{layer: {operand: [underflow, distortion]}}, means over the batches."""
    model = new_model(config, "fp8", 0)
    model.load_state_dict(state)
    watch, seen = FP8Monitor(model, 1), defaultdict(list)
    for number, (ids, cu_seqlens) in enumerate(batches, 1):
        with watch.measuring(number) as record, torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids, cu_seqlens=cu_seqlens, logits=False).loss.backward()
        for layer, values in record["layers"].items():
            for operand, pair in values.items():
                seen[layer, operand].append(pair)
    out = defaultdict(dict)
    for (layer, operand), pairs in seen.items():
        out[layer][operand] = [float(f"{mean(column):.3g}") for column in zip(*pairs, strict=True)]
    return out


def layer_errors(config: LingConfig, state: dict, batch) -> dict[str, dict[str, dict[str, float]]]:
    """{layer: {precision: {what: |it - fp64's| / |fp64's|}}} of each layer's output y, dx and weights' gradients, from
    the input and the output's gradient that it has in the whole model in fp64."""
    truth = new_model(config, "fp32", 0)
    truth.load_state_dict(state)
    narrow = {"bf16": new_model(config, "bf16", 0), "fp8": new_model(config, "fp8", 0)}
    for model in narrow.values():
        model.load_state_dict(state)
    truth.double()
    for router in truth.routers():  # its buffers stay fp32 otherwise
        router.expert_bias = router.expert_bias.double()
    seen = {}
    for name, module in truth.named_modules():
        if isinstance(module, MoE | MLP) or isinstance(truth.get_submodule(name.rpartition(".")[0]), Attention):
            module.register_forward_hook(lambda module, args, out, name=name: watch_one(seen, name, args[0], out))
    ids, cu_seqlens = batch
    truth(ids, labels=ids, cu_seqlens=cu_seqlens, logits=False).loss.backward()
    errors = {}
    for name, (x, dy) in seen.items():
        routed = None
        if isinstance(moe := truth.get_submodule(name), MoE):
            name = f"{name}.experts"
            p, experts, counts, _ = moe.router(x)
            routed = dispatch(experts, counts), p.detach()
        want = alone(truth.get_submodule(name), x, dy, routed)
        errors[name] = {}
        for precision, model in narrow.items():
            given = (t.float().bfloat16() for t in (x, dy))
            with torch.autocast("cpu", torch.bfloat16):
                got = alone(model.get_submodule(name), *given, routed and (routed[0], routed[1].float()))
            errors[name][precision] = {
                k: float(f"{float((got[k].double() - want[k]).norm() / want[k].norm()):.3g}") for k in want
            }
    return errors


def watch_one(seen: dict, name: str, x: Tensor, out) -> None:
    y = out[0] if isinstance(out, tuple) else out
    y.register_hook(lambda dy: seen.update({name: (x.detach(), dy)}))


def alone(module: nn.Module, x: Tensor, dy: Tensor, routed) -> dict[str, Tensor]:
    """A layer's y, dx and the gradient of each weight."""
    x = x.detach().requires_grad_()
    if not isinstance(module, Experts):
        y = module(x)
    elif isinstance(module, Fp8Experts):
        y = module(x, *routed)
    else:
        plan, p = routed
        y = unpermute(module(permute(x, plan), plan.offsets), plan, p)
    weights = dict(module.named_parameters())
    dx, *grads = torch.autograd.grad(y, [x, *weights.values()], dy.to(y.dtype))
    names = (f"d {name.removesuffix('.weight')}".replace("d weight", "dw") for name in weights)
    return dict(y=y.detach(), dx=dx) | dict(zip(names, grads, strict=True))


def load(results: Path) -> tuple[dict[str, dict], dict, dict]:
    """Runs by name, operands and gradients."""
    runs = {p.stem: json.loads(p.read_text()) for p in sorted(results.glob("*-[0-9].json"))}
    if not runs:
        raise InputError(f"{results} holds no runs")
    return runs, *(json.loads((results / f"{name}.json").read_text()) for name in ("operands", "gradients"))


def apart(runs: dict, one: str, two: str, first: float = 0.75) -> float:
    """By how much the mean loss of run `one` is above that of `two`, relative, from a share of the steps on."""
    a, b = (runs[name]["losses"][int(first * len(runs[name]["losses"])) :] for name in (one, two))
    return mean(a) / mean(b) - 1


def tables(runs: dict, measured: dict, gradients: dict) -> str:
    return "\n".join([*loss_table(runs), "", *norm_table(measured), "", *operand_table(measured), "",
                      *gradient_table(gradients["errors"])]) + "\n"  # fmt: skip


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [[title, *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows.items())]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def loss_table(runs: dict) -> list[str]:
    kinds = {"FP8": ("fp8", "norm"), "fp32": ("fp32", "norm"), "FP8, both without QK-norm": ("fp8", "plain")}
    rows = {}
    for text, (precision, kind) in kinds.items():
        pairs = [(f"{precision}-{kind}-{seed}", f"bf16-{kind}-{seed}") for seed in SEEDS]
        rows[text] = [f"{apart(runs, *pair):+.2%}" if all(p in runs for p in pair) else "not run" for pair in pairs]
    return table("mean loss of the last quarter, against bf16", [f"seed {seed}" for seed in SEEDS], rows)


def both(measured: dict, value: Callable[[dict], float], digits: str) -> str:
    """value of {(layer, operand): [underflow, distortion]} with QK-norm / without; a dash where nothing was run."""
    return " / ".join(format(value(of), digits) if of else "–" for of in (measured["norm"], measured["plain"]))


def norm_table(measured: dict) -> list[str]:
    """Over all layers and operands, and of those that the paper names: x and dy of query_key_value."""
    found = [{kind: late(measured[kind], str(seed)) for kind in ("norm", "plain")} for seed in SEEDS]
    rows = {}
    for i, metric in enumerate(METRICS):
        for text, value, wanted in (
            ("mean", mean, ALONG), ("highest", max, ALONG), ("query_key_value, x", mean, ("x",)),
            ("query_key_value, dy", mean, ("dy",)),
        ):  # fmt: skip

            def of(pairs, i=i, value=value, wanted=wanted):
                some = [
                    v[i] for (layer, o), v in pairs.items() if o in wanted and (wanted == ALONG or "query" in layer)
                ]
                return 1e4 * value(some)

            rows[f"{metric}, {text}"] = [both(seed, of, ".2f") for seed in found]
    return table("1e-4, with QK-norm / without", [f"seed {seed}" for seed in SEEDS], rows)


def operand_table(measured: dict) -> list[str]:
    found = {kind: [late(measured[kind], str(seed)) for seed in SEEDS] for kind in ("norm", "plain")}
    found = {kind: [of for of in seeds if of] for kind, seeds in found.items()}
    rows = {}
    for layer in dict.fromkeys(layer for layer, _ in found["norm"][0]):
        rows[f"`{layer}`"] = [
            both(found, lambda seeds, key=(layer, operand): 1e4 * mean(of[key][1] for of in seeds), ".2f")
            for operand in ALONG
        ]
    return table("distortion, 1e-4, mean of the seeds", list(ALONG), rows)


def late(by_seed: dict, seed: str) -> dict[tuple[str, str], list[float]]:
    """{(layer, operand): [underflow, distortion]}, means over the second half of the steps whose weights were kept."""
    steps = list(by_seed.get(seed, {}).values())
    steps = steps[len(steps) // 2 :]
    keys = [(layer, operand) for layer in steps[0] for operand in ALONG] if steps else []
    return {(a, o): [mean(pair) for pair in zip(*(step[a][o] for step in steps), strict=True)] for a, o in keys}


def gradient_table(errors: dict) -> list[str]:
    rows = {}
    for layer, by_precision in next(iter(errors.values())).items():
        rows[f"`{layer}`"] = [
            " / ".join(
                f"{mean(mean(of[layer][p][k] for k in names) for of in errors.values()):.2%}" for p in by_precision
            )
            for names in (["y"], ["dx"], [k for k in by_precision["fp8"] if k not in ("y", "dx")])
        ]
    return table("error against fp64, bf16 / FP8, mean of the seeds", ["y", "dx", "dw"], rows)


def draw(runs: dict, measured: dict, path: Path) -> None:
    """The losses; how far FP8 and fp32 are from bf16, by step; the distortion with and without QK-norm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for seed in SEEDS:
        smooth = {p: means(runs[f"{p}-norm-{seed}"]["losses"]) for p in COLOURS if f"{p}-norm-{seed}" in runs}
        for precision, values in smooth.items():
            steps = range(WINDOW, WINDOW + len(values))
            left.plot(steps, values, color=COLOURS[precision], linewidth=0.9, label=precision if seed == 0 else None)
            if precision != "bf16" and "bf16" in smooth:
                relative = [100 * (a / b - 1) for a, b in zip(values, smooth["bf16"], strict=True)]
                label = f"{precision} against bf16" if seed == 0 else None
                middle.plot(steps, relative, color=COLOURS[precision], linewidth=0.9, label=label)
        for kind, colour, label in (("norm", "#2a6fbb", "QK-norm"), ("plain", "#d1495b", "without")):
            by_step = measured[kind].get(str(seed), {})
            for operand, style in (("x", "-"), ("dyt", ":")):
                values = [1e4 * mean(of[operand][1] for of in layers.values()) for layers in by_step.values()]
                text = f"{operand}, {label}" if seed == 0 else None
                right.plot([int(s) for s in by_step], values, style, color=colour, linewidth=0.9, label=text)
    middle.axhspan(-0.25, 0.25, color="#8a8f98", alpha=0.2, linewidth=0)
    left.set(ylabel=f"loss, nats, mean of {WINDOW} steps")
    middle.set(ylabel="%, band of 0.25")
    right.set(ylabel="distortion, 1e-4, mean of the layers")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel("step")
    figure.savefig(path, dpi=110, metadata=dict(Software=None))
    plt.close(figure)


def means(losses: list[float]) -> list[float]:
    """Of every WINDOW steps in a row."""
    total, out = sum(losses[:WINDOW]), []
    for i in range(WINDOW, len(losses) + 1):
        out.append(total / WINDOW)
        if i < len(losses):
            total += losses[i] - losses[i - WINDOW]
    return out


def write_report(results: Path) -> None:
    found = load(results)
    fill(PAGE, dict(study_fp8=tables(*found)))
    draw(*found[:2], PICTURE)


@command
def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.study_fp8", description=__doc__.splitlines()[0])
    flags.add_argument("what", choices=("train", "measure", "report"))
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument("--weights", type=Path, help="folder for the text's tokens and for weights between steps")
    flags.add_argument("--steps", type=int, default=SETTINGS.steps)
    args = flags.parse_args()
    torch.set_num_threads(1)
    if args.what == "report":
        return write_report(args.results)
    if args.weights is None:
        raise InputError(f"{args.what} needs --weights")
    if args.what == "train":
        return train_all(args.results, args.weights, replace(SETTINGS, steps=args.steps))
    measure_all(args.results, args.weights)


if __name__ == "__main__":
    main()
