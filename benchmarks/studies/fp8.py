"""python -m benchmarks.studies.fp8 train|measure|report: does FP8 train as bf16 does? A small Ling on a CPU.

train    Three seeds in FP8, bf16 and fp32 (fp32 shows what bf16 itself costs), FP8 and bf16 also without QK-norm; equal
         data and equal first weights. Runs with a file in --results are not repeated. Weights go to --weights.
measure  With those weights, on held-out text: underflow and distortion of every FP8 layer's operands (as the trainer
         measures them), and each layer's outputs and gradients in bf16 and FP8 against fp64.
report   The tables of docs/fp8.md from --results.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.report import fill, table
from ling_kernels.commands import command
from ling_kernels.errors import InputError
from ling_kernels.files import atomic_write, origin
from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn import MLP, Attention, Experts, MoE
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.ops.dispatch import dispatch
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train.data import Documents, Packed, describe, gather_tokens, hold_out
from ling_kernels.train.monitor import METRICS, FP8Monitor
from ling_kernels.train.optimizer import adamw
from ling_kernels.train.prepare import deterministic
from ling_kernels.train.settings import Settings
from ling_kernels.train.trainer import Progress, train_step
from ling_kernels.train.validation import evaluate, validation_batches

RESULTS = Path(__file__).parent / "results/fp8"
PAGE = Path(__file__).parents[2] / "docs/fp8.md"
SETTINGS = Settings(steps=2000, seq_len=64, batch=4, lr=1e-3, warmup=100, eval_rows=256)
CONFIG = replace(
    LingConfig.tiny(), intermediate_size=256, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, n_group=2,
    topk_group=2, moe_intermediate_size=128, num_nextn_predict_layers=0, max_position_embeddings=64,
)  # fmt: skip
SEEDS = 0, 1, 2
RUNS = [  # precision, QK-norm, seed: the most important first
    *((precision, True, seed) for seed in SEEDS for precision in ("fp8", "bf16")),
    *((p, norm, seed) for p, norm in (("fp8", False), ("fp32", True), ("bf16", False)) for seed in SEEDS),
]
OPERANDS = ("x", "xt", "dy", "dyt")  # those that QK-norm may change
SAVE_EVERY = 250  # steps


def name_of(precision: str, qk_norm: bool, seed: int) -> str:
    return f"{precision}-{'norm' if qk_norm else 'plain'}-{seed}"


def new_model(config: LingConfig, precision: str, seed: int) -> Ling:
    """Random fp32 weights; with "fp8" in FP8, the experts' weight gradients too, even of few rows."""
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    if precision == "fp8":
        _, left = to_fp8(model, wgrad="fp8")
        assert not left, left
    return model.train()


def documents(weights: Path, config: LingConfig, settings: Settings) -> tuple[Documents, Documents, dict]:
    """Texts to train on, held-out texts, and a description of both for the results."""
    docs = gather_tokens(settings.data, load_tokenizer(None), config.vocab_size, weights / "tokens.bin")
    return *hold_out(docs, settings.holdout), describe(docs)


def run(config: LingConfig, settings: Settings, precision: str, weights: Path, name: str | None = None) -> dict:
    """Train; the loss of every step and the validation loss at the end. With a name, weights are saved on the way."""
    training, held_out, about = documents(weights, config, settings)
    packed = Packed(training, settings.seq_len, settings.seed)
    model = new_model(config, precision, settings.seed)
    optimizer = adamw(model, settings.lr, settings.weight_decay)
    progress, losses, start = Progress(), [], time.process_time()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    while progress.step < settings.steps:
        record, _ = train_step(model, optimizer, packed, settings, progress, dtype)
        losses.append(round(record["main_loss"], 6))
        if name and progress.step % SAVE_EVERY == 0:
            (weights / name).mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), weights / name / f"{progress.step}.pt")
        if progress.step % 100 == 0:
            print(f"  step {progress.step}  loss {mean(losses[-100:]):.4f}", flush=True)
    seconds = (time.process_time() - start) / settings.steps
    val_loss = evaluate(model, validation_batches([held_out], settings), dtype)
    about = dict(data=about, skipped=progress.skipped, cpu_seconds_per_step=round(seconds, 4))
    return about | dict(val_loss=val_loss, losses=losses)


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result) + "\n")


def train_all(results: Path, weights: Path, settings: Settings) -> None:
    for precision, qk_norm, seed in RUNS:
        name = name_of(precision, qk_norm, seed)
        if (results / f"{name}.json").exists():
            continue
        print(name, flush=True)
        config, mine = replace(CONFIG, use_qk_norm=qk_norm), replace(settings, seed=seed)
        about = dict(name=name, precision=precision, qk_norm=qk_norm, seed=seed) | origin()
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
    write(results / "operands.json", origin() | dict(norm=losses[True], plain=losses[False]))
    write(results / "gradients.json", origin() | dict(errors=errors))


def operands(config: LingConfig, state: dict, batches: list) -> dict[str, dict[str, list[float]]]:
    """{layer: {operand: [underflow, distortion]}}, means over the batches."""
    model = new_model(config, "fp8", 0)
    model.load_state_dict(state)
    watch, seen = FP8Monitor(model, 1), defaultdict(list)
    for number, (ids, cu_seqlens, _) in enumerate(batches, 1):
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
    """{layer: {precision: {name: |error| / |fp64's|}}} of each layer's y, dx and weights' gradients, at the x and dy
    that the layer has in the whole model in fp64."""
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
    ids, cu_seqlens, _ = batch
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
    y = module(x, *routed) if isinstance(module, Experts) else module(x)
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
    seeds = [f"seed {seed}" for seed in SEEDS]
    lines = table(" | ".join(["mean loss of the last quarter, against bf16", *seeds]), loss_rows(runs))
    lines += table(" | ".join(["1e-4, with QK-norm / without", *seeds]), norm_rows(measured))
    lines += table(" | ".join(["distortion, 1e-4, mean of the seeds", *OPERANDS]), operand_rows(measured))
    lines += table(
        "error against fp64, bf16 / FP8, mean of the seeds | y | dx | dw", gradient_rows(gradients["errors"])
    )
    return "\n".join(lines)


def loss_rows(runs: dict) -> Iterator[tuple[str, ...]]:
    kinds = {"FP8": ("fp8", "norm"), "fp32": ("fp32", "norm"), "FP8, both without QK-norm": ("fp8", "plain")}
    for text, (precision, kind) in kinds.items():
        pairs = [(f"{precision}-{kind}-{seed}", f"bf16-{kind}-{seed}") for seed in SEEDS]
        yield text, *(f"{apart(runs, *p):+.2%}" if {*p} <= {*runs} else "not run" for p in pairs)


def late(by_seed: dict, seed: int) -> dict[tuple[str, str], list[float]]:
    """{(layer, operand): [underflow, distortion]}, means over the second half of the steps with saved weights."""
    steps = list(by_seed.get(str(seed), {}).values())
    steps = steps[len(steps) // 2 :]
    keys = [(layer, operand) for layer in steps[0] for operand in OPERANDS] if steps else []
    return {(a, o): [mean(pair) for pair in zip(*(step[a][o] for step in steps), strict=True)] for a, o in keys}


def both(measured: dict, value: Callable[[dict], float]) -> str:
    """value, in 1e-4, with QK-norm / without; a dash where nothing was run."""
    return " / ".join(f"{1e4 * value(of):.2f}" if of else "–" for of in (measured["norm"], measured["plain"]))


def norm_rows(measured: dict) -> Iterator[tuple[str, ...]]:
    """Over all layers and operands, and of those that the paper names: x and dy of query_key_value."""
    found = [{kind: late(measured[kind], seed) for kind in ("norm", "plain")} for seed in SEEDS]
    for i, metric in enumerate(METRICS):
        for text, value in (("mean", mean), ("highest", max)):
            yield f"{metric}, {text}", *(both(f, lambda of, i=i, v=value: v(x[i] for x in of.values())) for f in found)
        for operand in ("x", "dy"):

            def of_qkv(of, i=i, operand=operand):
                return mean(v[i] for (layer, o), v in of.items() if o == operand and "query" in layer)

            yield f"{metric}, query_key_value, {operand}", *(both(f, of_qkv) for f in found)


def operand_rows(measured: dict) -> Iterator[tuple[str, ...]]:
    found = {kind: [of for seed in SEEDS if (of := late(measured[kind], seed))] for kind in ("norm", "plain")}
    for layer in dict.fromkeys(layer for layer, _ in found["norm"][0]):
        keys = [(layer, operand) for operand in OPERANDS]
        yield f"`{layer}`", *(both(found, lambda seeds, key=key: mean(of[key][1] for of in seeds)) for key in keys)


def gradient_rows(errors: dict) -> Iterator[tuple[str, ...]]:
    for layer, by_precision in next(iter(errors.values())).items():
        weights = [k for k in by_precision["fp8"] if k not in ("y", "dx")]
        yield (
            f"`{layer}`",
            *(
                " / ".join(f"{mean(of[layer][p][k] for of in errors.values() for k in ks):.2%}" for p in by_precision)
                for ks in (["y"], ["dx"], weights)
            ),
        )


@command
def main() -> None:
    flags = argparse.ArgumentParser(
        "python -m benchmarks.studies.fp8", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    flags.add_argument("command", choices=("train", "measure", "report"))
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument("--weights", type=Path, help="folder for the text's tokens and for weights between steps")
    flags.add_argument("--steps", type=int, default=SETTINGS.steps)
    args = flags.parse_args()
    torch.set_num_threads(1)
    if args.command == "report":
        return fill(PAGE, dict(study_fp8=tables(*load(args.results))))
    if args.weights is None:
        raise InputError(f"{args.command} needs --weights")
    if args.command == "train":
        return train_all(args.results, args.weights, replace(SETTINGS, steps=args.steps))
    measure_all(args.results, args.weights)


if __name__ == "__main__":
    main()
