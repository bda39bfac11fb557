"""python -m benchmarks.bench_decode: how fast texts are written, against the memory's bound and against others.

Ling-mini in bf16 and FP8 and Ling-flash in FP8 on a GPU, the tiny model elsewhere, with random weights: no download.
For each engine, number of texts and length: tokens a second, the share of what reading a step's bytes allows
(generate/plan.py, with the experts that these texts do meet; by the data sheet's bandwidth, or a measured copy's),
kernels and calls of the host a layer, and where one profiled step goes. Reading the prompts is not counted. Each engine
has a process of its own; one that is not here, or does not know Ling-2.0, is listed with what it says.

`make bench` runs bench_decode below, which is ours alone.
"""

import argparse
import functools
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.clock import Tick, once, rate_of
from benchmarks.gpu import origin
from benchmarks.models import random_model, without_mtp
from benchmarks.observe import profile
from benchmarks.peers import absent, engines
from ling_kernels.errors import InputError, command
from ling_kernels.generate import Engine
from ling_kernels.generate.plan import gpus, held_bytes, step_bytes, tokens_per_second
from ling_kernels.gpu import named
from ling_kernels.model import Ling

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MODELS = [("mini", "bf16"), ("mini", "fp8"), ("flash", "fp8")] if GPU else [("tiny", "fp32")]
BATCHES, CONTEXTS, TOKENS = ([1, 8, 64], [0, 4096], 64) if GPU else ([1, 8], [0, 256], 16)
OTHERS = {"transformers": "transformers", "vLLM": "vllm", "SGLang": "sglang"}  # and what is imported
WARM = 8  # steps before those that count
PARTS = (  # of a step, by what kernels are called, or on a CPU torch's ops; the first that fits
    ("attention", "attention|qk_norm|norm_rope"),
    ("experts", "grouped|moe|swiglu|permute|dispatch"),
    ("router", "route|split_gemm"),
    ("norms, quantisation", "rms_norm|quantize"),
    ("other products", "gemm|gemv|nvjet|cutlass|cublas|linear|mm$|matmul"),
    ("sampling", "sort|softmax|argmax|cumsum|searchsorted|topk"),
    ("copies", "memcpy|memset|copy|cat$|index|gather|scatter|fill"),
)


@functools.lru_cache(maxsize=1)
def model_of(name: str, precision: str) -> Ling:
    return random_model(without_mtp(name), precision, DEVICE)


@functools.cache
def bandwidth() -> tuple[float, str]:
    """Bytes a second, and whose word that is."""
    plate = named(torch.cuda.get_device_name()) if GPU else None
    if plate:
        return plate.bandwidth, f"{plate.name}'s data sheet"
    if GPU:
        call, moved = rate_of("copy")
        return moved / once(call), "a copy, measured"
    x, y = torch.randn(1 << 24), torch.empty(1 << 24)
    y.copy_(x)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(times), "a copy, measured"


def prompts_of(vocabulary: int, batch: int, context: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (batch, max(context, 1)), generator=generator).tolist()


@torch.inference_mode()
def experts_met(model: Ling, texts: list[list[int]], tail: int = 16) -> float | None:
    """Of a layer, by the last tokens of the texts together, on the average: random weights do not route evenly."""
    texts, seen = [t[-tail:] for t in texts], []
    ends = torch.tensor([len(t) for t in texts]).cumsum(0)
    last = (ends - 1).to(DEVICE)
    bounds = torch.cat([torch.zeros(1), ends]).to(DEVICE, torch.int32)
    hooks = [
        r.register_forward_hook(lambda _, __, out: seen.append(len(out[1][last].unique()))) for r in model.routers()
    ]
    try:
        model(torch.tensor([sum(texts, [])], device=DEVICE), cu_seqlens=bounds, logits=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(seen) / len(seen) if seen else None


def begin(model: Ling, prompts: list[list[int]], tokens: int) -> tuple[Engine, list]:
    """An engine that has read the prompts, and its requests, none of which ends within so many tokens."""
    room = tokens + 2 * WARM
    gc.collect()  # the engine before this one, with its cache
    engine = Engine(model, cache_tokens=len(prompts) * (len(prompts[0]) + room + 64), max_running=len(prompts))
    requests = [engine.submit(p, max_new_tokens=room, ends=()) for p in prompts]
    while not all(r.written for r in requests):
        engine.step()
    for _ in range(WARM - 2):
        engine.step()
    return engine, requests


def wait() -> float:
    torch.cuda.synchronize() if GPU else None
    return time.perf_counter()


def ours(name: str, precision: str, batch: int, context: int, tokens: int) -> dict:
    model = model_of(name, precision)
    engine, requests = begin(model, prompts_of(model.config.vocab_size, batch, context), tokens)
    written, began = sum(r.written for r in requests), wait()
    for _ in range(tokens):
        engine.step()
    seconds, written = wait() - began, sum(r.written for r in requests) - written
    assert all(r.finished is None for r in requests) and written, "texts that end leave the batch"
    told = profile(engine.step)
    layers = model.config.num_hidden_layers
    started = dict(launches_per_layer=told.kernels / layers, calls_per_layer=told.calls / layers) if GPU else {}
    return dict(
        tokens_per_s=written / seconds, experts_met=experts_met(model, [r.tokens for r in requests]),
        parts=told.parts(PARTS), **started,
    )  # fmt: skip


def by_difference(generate: Callable, prompts: list[list[int]], tokens: int) -> float:
    """Tokens a second between texts of WARM new tokens and of `tokens` more."""
    generate(prompts, WARM)
    times = []
    for new in (WARM, WARM + tokens):
        began = wait()
        out = generate(prompts, new)
        times.append(wait() - began)
        if [len(ids) for ids in out] != [new] * len(prompts):
            raise ValueError(f"it wrote {[len(ids) for ids in out]} tokens and not {new}")
    return len(prompts) * tokens / (times[1] - times[0])


def others(by: str, name: str, precision: str, texts: list[tuple[int, int]], tokens: int):
    """A row of each (batch, context)."""
    config = without_mtp(name)
    with tempfile.TemporaryDirectory(prefix="ling-") as folder:
        if by == "transformers":
            if precision == "fp8":
                raise NotImplementedError("timed in bf16 alone")
            generate = engines.transformers_generate(model_of(name, precision))
        else:
            if not GPU:
                raise NotImplementedError("needs a GPU")
            start = engines.vllm_generate if by == "vLLM" else engines.sglang_generate
            longest, most = max(c for _, c in texts) + tokens + 2 * WARM, max(b for b, _ in texts)
            generate = start(engines.folder_of(config, precision == "fp8", Path(folder)), longest, most)
        for batch, context in texts:
            prompts = prompts_of(config.vocab_size, batch, context)
            yield batch, context, dict(tokens_per_s=by_difference(generate, prompts, tokens))


def fits(name: str, precision: str, batch: int, context: int) -> bool:
    held = held_bytes(without_mtp(name), batch, context + TOKENS, "fp8" if precision == "fp8" else "bf16")
    return not GPU or gpus(held, torch.cuda.get_device_properties(0).total_memory) == 1


def measure(by: str, args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """Rows, and why the others are none."""
    rows, left = [], []
    for name, precision in args.models:
        about = dict(model=name, precision=precision, by=by)
        texts = [(b, c) for c in args.contexts for b in args.batches]
        for batch, context in [text for text in texts if not fits(name, precision, *text)]:
            texts.remove((batch, context))
            left.append(f"{by}, {name} in {precision}, {batch} texts of {context}: more than this GPU's memory")
        if not texts:
            continue
        try:
            if by == "ours":
                found = ((b, c, ours(name, precision, b, c, args.tokens)) for b, c in texts)
            else:
                if why := absent(OTHERS[by]):
                    raise ImportError(why)
                found = others(by, name, precision, texts, args.tokens)
            for batch, context, row in found:
                rows.append(about | dict(batch=batch, context=context) | row)
                print(f"{by}, {name} {precision}, {batch} texts of {context}: {row['tokens_per_s']:.0f} tokens/s",
                      file=sys.stderr, flush=True)  # fmt: skip
        except Exception as error:  # others raise what they like
            if by == "ours":
                raise
            left.append(f"{by}, {name} in {precision}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return rows, left


def bounded(rows: list[dict], tokens: int) -> None:
    """Add what each could be at most: the experts that ours met count for all."""
    met = {(r["model"], r["batch"], r["context"]): r.get("experts_met") for r in rows if r["by"] == "ours"}
    for r in rows:
        weights = "fp8" if r["precision"] == "fp8" else "bf16"
        context = r["context"] + WARM + tokens // 2
        parts = step_bytes(without_mtp(r["model"]), r["batch"], context, weights,
                           met=met.get((r["model"], r["batch"], r["context"])))  # fmt: skip
        wide = 2 if r["precision"] == "fp32" else 1
        r["bytes"] = wide * sum(parts.values())
        r["bound"] = tokens_per_second(parts, r["batch"], bandwidth()[0] / wide)
        r["share"] = r["tokens_per_s"] / r["bound"]


def show(result: dict) -> None:
    rows = result["rows"]
    print(
        f"\n{result['machine']}: greedy decoding; bound by {result['bandwidth'] / 1e12:.3g} TB/s, {result['source']}\n"
    )
    print(f"{'model':13}{'texts':>6}{'context':>8}  {'by':13}{'tokens/s':>10}{'ms/step':>9}{'bound':>10}{'share':>7}"
          f"{'kernels':>9}{'calls':>7}  (a layer)")  # fmt: skip
    for r in sorted(rows, key=lambda r: (r["model"], r["precision"], r["context"], r["batch"])):
        started = (r.get("launches_per_layer"), r.get("calls_per_layer"))
        started = [f"{n:.1f}" if n is not None else "" for n in started]
        print(f"{r['model'] + ' ' + r['precision']:13}{r['batch']:6}{r['context']:8}  {r['by']:13}"
              f"{r['tokens_per_s']:10,.0f}{1e3 * r['batch'] / r['tokens_per_s']:9.2f}{r['bound']:10,.0f}"
              f"{r['share']:7.1%}{started[0]:>9}{started[1]:>7}".rstrip())  # fmt: skip
    print("\nOne step of ours, microseconds by kernels' names (on a CPU torch's ops):")
    for r in (r for r in rows if "parts" in r):
        told = ", ".join(f"{part} {us:,.0f}" for part, us in r["parts"].items())
        print(f"  {r['model']} {r['precision']}, {r['batch']} texts of {r['context']}: {told}")
    for why in result["left_out"]:
        print(f"not timed: {why}")


def pair(text: str) -> tuple[str, str]:
    name, _, precision = text.partition(":")
    if precision not in ("fp32", "bf16", "fp8"):
        raise argparse.ArgumentTypeError(f"{text}: a preset, a colon, and fp32, bf16 or fp8")
    return name, precision


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", type=pair, default=MODELS, metavar="NAME:PRECISION", help="e.g. mini:bf16 flash:fp8")
    add("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="texts at once")
    add("--contexts", nargs="+", type=int, default=CONTEXTS, metavar="N", help="tokens that the texts have")
    add("--tokens", type=int, default=TOKENS, metavar="N", help="timed, of each text")
    add("--by", nargs="+", choices=["ours", *OTHERS], default=["ours", *OTHERS])
    add("--out", type=Path, metavar="FILE", help="all of it as JSON")
    args = parser.parse_args()
    if min(args.batches) < 1 or min(args.contexts) < 0 or args.tokens < 1:
        raise InputError("--batches and --tokens take numbers from 1 on, --contexts from 0 on")
    machine = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    result = origin() | dict(torch=torch.__version__, machine=machine, rows=[], left_out=[])
    with tempfile.TemporaryDirectory() as folder:
        for by in args.by:
            if len(args.by) == 1:
                rows, left = measure(by, args)
            else:
                rows, left = apart(by, args, Path(folder, "part.json"))
            result["rows"] += rows
            result["left_out"] += left
    bounded(result["rows"], args.tokens)
    result["bandwidth"], result["source"] = bandwidth()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 0


def apart(by: str, args: argparse.Namespace, part: Path) -> tuple[list[dict], list[str]]:
    """Measured by a process of its own, whose end gives all its memory back."""
    lists = dict(models=map(":".join, args.models), batches=args.batches, contexts=args.contexts, tokens=[args.tokens])
    flags = [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]
    part.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "benchmarks.bench_decode", "--by", by, *flags, "--out", part],
                   stdout=subprocess.DEVNULL, check=by == "ours")  # fmt: skip
    if not part.exists():
        return [], [f"{by}: its process ended without a result"]
    told = json.loads(part.read_text())
    return told["rows"], told["left_out"]


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    yield
    model_of.cache_clear()
    torch.cuda.empty_cache()


@pytest.mark.benchmark(timer=Tick if GPU else time.perf_counter, group="decode")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name, precision", [m for m in MODELS if m[0] != "flash"])
def bench_decode(benchmark, name, precision, batch, context):
    """A token of each text; the prompts are read before."""
    model = model_of(name, precision)
    engine, requests = begin(model, prompts_of(model.config.vocab_size, batch, context), TOKENS)
    benchmark.pedantic(engine.step, warmup_rounds=2, rounds=TOKENS - 4)
    assert all(r.finished is None for r in requests), "texts that end leave the batch"
    row = dict(model=name, precision=precision, batch=batch, context=context, by="ours",
               tokens_per_s=batch / benchmark.stats.stats.median,
               experts_met=experts_met(model, [r.tokens for r in requests]))  # fmt: skip
    bounded([row], TOKENS)
    told, layers = profile(engine.step), model.config.num_hidden_layers
    benchmark.extra_info.update(
        decode=f"{name}, batch {batch}, context {context}, {precision}", tokens_per_s=row["tokens_per_s"],
        bytes=int(row["bytes"]), flops=0, precision="bf16", experts_met=row["experts_met"],
        launches_per_layer=told.kernels / layers if GPU else None, parts=told.parts(PARTS),
        breakdown=told.largest() if (batch, context) == (BATCHES[-1], CONTEXTS[-1]) else None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command(main)())
