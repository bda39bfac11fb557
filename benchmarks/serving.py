"""python -m benchmarks.serving: what users of a server feel. Requests arrive at random through Engine.astream.

For each rate of arrival (a second, exponential gaps; inf: all at once): requests and tokens a second, the time to the
first token and between tokens, 50th and 99th of a hundred. Lengths are drawn evenly from half to one and a half times
--prompt and --new. Weights are random, or --folder's; so are prompts, and nothing of them is shared.
"""

import argparse
import asyncio
import json
import math
import random
import sys
import time
from pathlib import Path

import torch

from benchmarks.bench_decode import DEVICE, GPU, MODELS, pair
from benchmarks.gpu import origin
from benchmarks.models import random_model
from ling_kernels.errors import InputError, command
from ling_kernels.generate import Engine
from ling_kernels.model import LingConfig, load_model

RATES = ["1", "4", "16", "inf"] if GPU else ["20", "inf"]
REQUESTS, PROMPT, NEW = (256, 512, 128) if GPU else (16, 32, 16)


async def one(engine: Engine, prompt: list[int], new: int) -> list[float]:
    """When it was asked for, and when each of its tokens came."""
    times = [time.perf_counter()]
    async for _ in engine.astream(prompt, max_new_tokens=new, ends=()):
        times.append(time.perf_counter())
    return times


async def arrive(engine: Engine, rate: float, asked: list[tuple[list[int], int]], seed: int) -> list[list[float]]:
    gaps, running = random.Random(seed), []
    for prompt, new in asked:
        running.append(asyncio.create_task(one(engine, prompt, new)))
        await asyncio.sleep(0 if math.isinf(rate) else gaps.expovariate(rate))
    return await asyncio.gather(*running)


def told(times: list[list[float]]) -> dict:
    seconds = max(t[-1] for t in times) - min(t[0] for t in times)
    first = [t[1] - t[0] for t in times]
    between = [b - a for t in times for a, b in zip(t[1:], t[2:], strict=False)]
    return dict(
        requests_per_s=len(times) / seconds, tokens_per_s=sum(len(t) - 1 for t in times) / seconds,
        first_p50=share(first, 0.5), first_p99=share(first, 0.99),
        between_p50=share(between, 0.5), between_p99=share(between, 0.99),
    )  # fmt: skip


def share(values: list[float], part: float) -> float:
    """The smallest that so many are at most."""
    return sorted(values)[max(math.ceil(part * len(values)) - 1, 0)]


def requests_of(config: LingConfig, count: int, prompt: int, new: int, seed: int) -> list[tuple[list[int], int]]:
    draw = random.Random(seed)

    def about(n: int) -> int:
        return draw.randint(max(n // 2, 2), max(n + n // 2, 2))

    return [([draw.randrange(config.vocab_size) for _ in range(about(prompt))], about(new)) for _ in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=pair, default=MODELS[-1] if not GPU else MODELS[1], metavar="NAME:PRECISION")
    add("--folder", type=Path, metavar="DIR", help="not random weights but this checkpoint's")
    add("--rates", nargs="+", type=float, default=[float(r) for r in RATES], metavar="N", help="arrivals a second")
    add("--requests", type=int, default=REQUESTS, metavar="N", help="at each rate")
    add("--prompt", type=int, default=PROMPT, metavar="N", help="tokens")
    add("--new", type=int, default=NEW, metavar="N", help="tokens")
    add("--max-running", type=int, default=64, metavar="N")
    add("--draft", type=int, default=0, metavar="N", help="tokens to guess ahead in each step")
    add("--out", type=Path, metavar="FILE", help="all of it as JSON")
    args = parser.parse_args()
    if min(args.rates) <= 0 or min(args.requests, args.prompt, args.new) < 1:
        raise InputError("--rates are above 0, --requests, --prompt and --new at least 1")
    name, precision = args.model
    if args.folder:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        model = load_model(args.folder, dtype, DEVICE, fp8=precision == "fp8")
    else:
        model = random_model(LingConfig.preset(name), precision, DEVICE)
    engine = Engine(model, max_running=args.max_running, max_waiting=args.requests, draft=args.draft)
    machine = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    about = dict(machine=machine, model=str(args.folder or name), precision=precision)
    about |= {k: getattr(args, k) for k in ("requests", "prompt", "new", "max_running", "draft")}
    asyncio.run(arrive(engine, math.inf, requests_of(model.config, 4, args.prompt, args.new, 1), 1))  # warm
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'arrivals/s':>10}{'requests/s':>12}{'tokens/s':>10}{'first, ms: p50':>16}{'p99':>9}"
          f"{'between, ms: p50':>18}{'p99':>9}")  # fmt: skip
    rows = []
    for number, rate in enumerate(args.rates, 2):
        asked = requests_of(model.config, args.requests, args.prompt, args.new, number)
        r = told(asyncio.run(arrive(engine, rate, asked, number)))
        rows.append(dict(rate=str(rate)) | r)
        ms = (f"{1e3 * r[k]:.1f}" for k in ("first_p50", "first_p99", "between_p50", "between_p99"))
        cells = [f"{rate:g}", f"{r['requests_per_s']:.2f}", f"{r['tokens_per_s']:.0f}", *ms]
        print("".join(f"{c:>{w}}" for c, w in zip(cells, (10, 12, 10, 16, 9, 18, 9), strict=True)), flush=True)
    if args.out:
        args.out.write_text(json.dumps(origin() | about | dict(torch=torch.__version__, rows=rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
