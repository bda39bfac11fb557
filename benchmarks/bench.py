"""All suites: rates of the GPU, ops, layers and steps of a model, decoding and serving, the host's share, peers.

    pytest benchmarks/bench.py [--shapes own|grid|small] [-k ...] [--benchmark-json=FILE] [--benchmark-compare=FILE]

`make bench` runs them and writes the machine's results and docs/performance.md. Work (bytes, FLOPs), shapes and further
figures are in `extra_info`. The groups of one op at one shape hold our backends and the peers that are installed.
"""

import asyncio
import dataclasses
import functools
import gc
import math
import random
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from benchmarks import models, peers
from benchmarks.models import DEVICE, GPU
from benchmarks.timing import RATES, Tick, copies, rate_call, time_calls
from benchmarks.work import Backward, forward_work, op_of, shapes, tensors, title
from ling_kernels.backend import force
from ling_kernels.generate import Engine
from ling_kernels.model import Ling, LingConfig
from ling_kernels.plan.decode import gpus, held_bytes, step_bytes
from ling_kernels.train.prepare import peak_flops
from tests.cases import CASES, args_of, runs

pytestmark = pytest.mark.benchmark(timer=Tick if GPU else time.perf_counter)
DTYPE = torch.bfloat16 if GPU else torch.float32


@pytest.fixture(autouse=True)
def free_gpu_memory():
    yield
    torch.cuda.empty_cache() if GPU else None


# Ops: each at its Case's own shape, also over Ling's grid with --shapes grid.

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"


def op_rows(which: str) -> list:
    """(Case, shape, implementation, pass) of our backends and, at the first shape, the reference."""
    rows, skip = [], pytest.mark.skip("cannot run here")
    for case in CASES:
        for i, shape in enumerate(shapes(case, which)):
            for by in [b for b in ("cuda", "triton") if b in case.backends] + ["torch"] * (i == 0):
                marks = () if by == "torch" or GPU and runs(by) else skip
                rows += [pytest.param(case, shape, by, name, marks=marks) for name in (FORWARD, BACKWARD)]
    return rows


def peer_rows(which: str) -> list:
    found = [(case, peer) for peer in peers.names() for case in CASES if peer in peers.of(case)]
    return [
        pytest.param(case, shape, peer, FORWARD)
        for case, peer in found for shape in shapes(case, which)[: 1 if peer == "torch.compile" else None]
    ]  # fmt: skip


def pytest_generate_tests(metafunc):
    make, which = dict(bench_op=op_rows, bench_peer=peer_rows), metafunc.config.getoption("--shapes")
    if metafunc.function.__name__ in make:
        rows = make[metafunc.function.__name__](which) if GPU or which == "small" else []
        ids = ["-".join([title(*r.values[:2]), *r.values[2:]]) for r in rows]
        metafunc.parametrize("case, shape, by, name", rows, ids=ids)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("rate", RATES)
def bench_rate(benchmark, rate):
    """Measure this GPU's bandwidth and matrix rates; the report compares the ops with them and with the data sheet."""
    benchmark.group = "rates"
    call, amount = rate_call(rate)
    time_calls(benchmark, call)
    benchmark.extra_info.update(rate=rate, per_second=amount / benchmark.stats.stats.median)


def bench_op(benchmark, case, shape, by, name):
    benchmark.group, op, kwargs = f"{title(case, shape)} {name}", op_of(case), case.kwargs
    args, several, error = tuple(args_of(case, shape, case.dtypes[0])), None, None
    try:
        with nullcontext() if by in peers.names() else force(by):
            if name == BACKWARD:
                backward = Backward(case, shape, args) if any(t.requires_grad for t in tensors(args)) else None
                if backward is None or not backward.outs:
                    pytest.skip("has no gradient")
                call, work = backward.run, backward.work
                several = lambda: [Backward(case, shape, a).run for a in copies(args, work.bytes)[1:]]  # noqa: E731
            else:
                args = peers.detached(args)
                if by in peers.names():
                    call, error, outs = peers.checked(by, case, args)
                else:
                    call, outs = functools.partial(op, *args, **kwargs), op(*args, **kwargs)
                    several = lambda: [functools.partial(op, *a, **kwargs) for a in copies(args, work.bytes)]  # noqa: E731
                work = forward_work(case, shape, args, outs)
            time_calls(benchmark, call, several)
    except torch.OutOfMemoryError:
        pytest.skip("needs more memory than this GPU has")
    except Exception as error:  # a foreign library may raise anything
        if by not in peers.names():
            raise
        pytest.skip(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
    benchmark.extra_info.update(
        case=title(case, shape), op=case.op.__name__, by=by, name=name, shape={k: str(v) for k, v in shape.items()},
        bytes=work.bytes, flops=work.flops, precision=work.precision, error=error,
    )  # fmt: skip


# Layers and steps of Ling-mini with random weights.

EXPERTS = 256 if GPU else 32  # a CPU gets the experts of one GPU of eight
LAYERS = [
    *((T, FORWARD, by) for T in ((64, 8192) if GPU else (1, 16, 64)) for by in ("ours", "loop", "transformers")),
    *((8192 if GPU else 64, BOTH, by) for by in ("ours", "loop")),
]


@pytest.mark.parametrize("T, name, by", LAYERS, ids=lambda v: str(v).replace(" ", "-"))
def bench_layer(benchmark, T, name, by):
    """`error` is the distance of the result, or of x's gradient, from the loop over experts, relative."""
    pytest.importorskip("transformers") if by == "transformers" else None
    benchmark.group, layer = f"MoE layer, {T} tokens, {name}", models.random_layer(EXPERTS, DTYPE)
    x = torch.randn(T, models.MINI.hidden_size, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    call, loop = (models.pass_of(*models.layer_call(b, layer), x.to(DTYPE), name == BOTH) for b in (by, "loop"))
    got, want = call().float(), loop().float()
    torch.cuda.reset_peak_memory_stats() if GPU else None
    benchmark.pedantic(call, warmup_rounds=1, rounds=50 if GPU else 5)
    seconds, (rate, source) = benchmark.stats.stats.median, peak_flops(torch.device(DEVICE), DTYPE)
    flops = models.layer_flops(EXPERTS, T) * (3 if name == BOTH else 1)
    benchmark.extra_info.update(
        layer=f"MoE layer of Ling-mini, {EXPERTS} experts, {T} tokens, {str(DTYPE)[6:]}", name=name, by=by, peak=source,
        error=((got - want).norm() / want.norm()).item(), tokens_per_s=T / seconds, mfu=flops / seconds / rate,
        peak_memory=torch.cuda.max_memory_allocated() if GPU else None,
    )  # fmt: skip


# `tiny` is what `make train` trains. transformers has no MTP layer, so the two that are compared have none.
STEPS = [("tiny", "ours"), ("tiny without MTP", "ours"), ("tiny without MTP", "transformers")]
STEPS = [("two layers of mini", "ours")] if GPU else STEPS


@pytest.mark.parametrize("name, by", STEPS, ids=lambda v: v.replace(" ", "-"))
def bench_train_step(benchmark, name, by):
    """Forward, backward and AdamW; `error` is the distance of the first loss from ours, relative."""
    pytest.importorskip("transformers") if by == "transformers" else None
    config, batch, length = LingConfig.tiny(), 4, 256
    if GPU:
        config, batch, length = dataclasses.replace(LingConfig.mini(), num_hidden_layers=2), 2, 4096
    if name.endswith("without MTP"):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Ling(config)
        ids = torch.randint(0, 256, (batch, length))
    model.init_weights()
    wanted = model(ids, labels=ids, logits=False).loss.item() if by != "ours" else None
    trained = model if by == "ours" else models.transformers_model(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            out = model(ids, labels=ids, logits=False) if by == "ours" else trained(ids, labels=ids)
            out.loss.backward()
        optimizer.step()
        model.balance_(1e-3) if by == "ours" else None
        return out.loss

    error = None if wanted is None else abs(step().item() / wanted - 1)
    benchmark.group = f"training step, {name}"
    benchmark.pedantic(step, warmup_rounds=2, rounds=20)
    seconds, flops = benchmark.stats.stats.median, config.flops_per_token(length) * batch * length
    rate, source = peak_flops(torch.device(DEVICE), DTYPE)
    benchmark.extra_info.update(
        step=f"training, {name}, {batch} x {length} tokens", by=by, peak=source, error=error,
        tokens_per_s=batch * length / seconds, mfu=flops / seconds / rate,
    )  # fmt: skip


# Decoding and serving with random weights of the real shapes.

MODELS = [("mini", "bf16"), ("mini", "fp8"), ("flash", "fp8")] if GPU else [("tiny", "fp32")]
BATCHES, CONTEXTS, NEW = ([1, 8, 64], [0, 4096], 64) if GPU else ([1, 8, 64], [0, 256], 16)
WARM = 8  # decode steps before those that are timed


@pytest.mark.parametrize("by", ["ours"] if GPU else ["ours", "transformers"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model, precision", MODELS)
def bench_decode(benchmark, model, precision, batch, context, by):
    """Decode steps of a batch of texts, without their prompts; `bytes` are those that a step reads. transformers' are
    those of its model and cache, without `generate` around them."""
    pytest.importorskip("transformers") if by == "transformers" else None
    weights, ling = "fp8" if precision == "fp8" else "bf16", models.random_model(model, precision)
    held = held_bytes(ling.config, batch, context + NEW, weights)
    if GPU and gpus(held, torch.cuda.get_device_properties(0).total_memory) > 1:
        pytest.skip("needs more memory than this GPU has")
    benchmark.group = f"decode {model} {precision}"
    texts = models.prompts(ling.config.vocab_size, batch, max(context, 1))
    if by == "ours":
        engine, requests = start(ling, texts)
        step = engine.step
    else:
        step, requests = models.transformers_decode(ling, texts), []
        for _ in range(WARM):
            step()
    benchmark.pedantic(step, rounds=4, iterations=NEW // 4)  # the steps of a round overlap on host and GPU
    kernels = count_kernels(step) / ling.config.num_hidden_layers if GPU else None
    if any(r.finished is not None for r in requests):
        raise RuntimeError("a text ended and left the batch")
    used = models.experts_used(ling, [r.tokens for r in requests] or texts)
    read = step_bytes(ling.config, batch, context + WARM + NEW // 2, weights, met=used)
    benchmark.extra_info.update(
        decode=f"{model} {precision}, {batch} texts of {context} tokens", by=by, kernels_per_layer=kernels,
        experts_used=used, tokens_per_s=batch / benchmark.stats.stats.median, flops=0, precision="bf16",
        bytes=int(sum(read.values()) * (2 if precision == "fp32" else 1)),
    )  # fmt: skip


@pytest.mark.skipif(GPU, reason="on a GPU a step ends after the next has begun")
@pytest.mark.parametrize("context", [32, 256])
@pytest.mark.parametrize("batch", BATCHES)
def bench_generate(benchmark, batch, context):
    """Decode steps of the engine between those of transformers' `generate`."""
    pytest.importorskip("transformers")
    ling, pairs = models.random_model(*MODELS[0]), []
    texts = models.prompts(ling.config.vocab_size, batch, context)

    def run():
        engine, requests = start(ling, texts)
        pairs.extend(models.generate_between(ling, texts, NEW, engine.step)[1:])
        assert all(r.finished is None for r in requests)

    benchmark.group = "decode beside generate"
    benchmark.pedantic(run, rounds=4)
    ours, theirs = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    benchmark.extra_info.update(
        beside=f"{ling.name}, {batch} texts of {context} tokens", ours_ms=ours, generate_ms=theirs,
        ratio=statistics.median(a / b for a, b in pairs),
    )  # fmt: skip


def start(ling: Ling, prompts: list[list[int]]) -> tuple[Engine, list]:
    """An engine that has read the prompts and taken WARM steps, and requests too long to end while they are timed."""
    gc.collect()  # the last engine and its cache
    new = NEW + 2 * WARM + 4 * len(prompts)  # while prompts are read, in several passes, the first texts go on
    engine = Engine(ling, cache_tokens=len(prompts) * (len(prompts[0]) + new + 64), max_running=len(prompts))
    requests = [engine.submit(p, max_new_tokens=new, stop_token_ids=()) for p in prompts]
    while not all(r.num_new_tokens for r in requests):
        engine.step()
    for _ in range(WARM - 2):
        engine.step()
    return engine, requests


def count_kernels(call) -> int:
    """How many kernels one call runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.self_device_time_total)


@pytest.mark.parametrize("rate", (1, 4, 16, math.inf) if GPU else (20, math.inf))
def bench_serve(benchmark, rate):
    """Requests that arrive at random (exponential gaps, `rate` a second; inf: all at once) through Engine.astream."""
    count, prompt, new = (256, 512, 128) if GPU else (16, 32, 16)
    ling, draw = models.random_model(*MODELS[min(1, len(MODELS) - 1)]), random.Random(0)
    sizes = [(draw.randint(prompt // 2, prompt * 3 // 2), draw.randint(new // 2, new * 3 // 2)) for _ in range(count)]
    asked = [(models.prompts(ling.config.vocab_size, 1, p, seed=i)[0], n) for i, (p, n) in enumerate(sizes)]

    async def request(engine, ids, n):
        times = [time.perf_counter()]
        async for _ in engine.astream(ids, max_new_tokens=n, stop_token_ids=()):
            times.append(time.perf_counter())
        return times

    async def arrive():
        engine, tasks = Engine(ling, max_running=64, max_waiting=count), []
        for ids, n in asked:
            tasks.append(asyncio.create_task(request(engine, ids, n)))
            await asyncio.sleep(0 if math.isinf(rate) else draw.expovariate(rate))
        return await asyncio.gather(*tasks)

    benchmark.group = "serving"
    times = benchmark.pedantic(lambda: asyncio.run(arrive()), warmup_rounds=1, rounds=1)
    seconds = max(t[-1] for t in times) - min(t[0] for t in times)
    first, between = [t[1] - t[0] for t in times], [b - a for t in times for a, b in zip(t[1:], t[2:], strict=False)]
    benchmark.extra_info.update(
        serve=f"{ling.name}, {count} requests, {rate:g} a second", requests_per_s=count / seconds,
        tokens_per_s=sum(len(t) - 1 for t in times) / seconds,
        **{f"{name}_p{p}_ms": 1e3 * percentile(values, p) for p in (50, 99)
           for name, values in (("first", first), ("between", between))},
    )  # fmt: skip


def percentile(values: list[float], p: float) -> float:
    """The smallest value that p percent of the values do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * p / 100) - 1, 0)]


# The host's share: CPU time of a call up to its last launch. Without a GPU a launch is counted and returns.


@contextmanager
def launches():
    """A list of the Triton kernels that are launched. Without a GPU none runs, and the ops do not look at values."""
    from triton.runtime.jit import JITFunction

    found, run = [], JITFunction.run

    def launch(fn, *args, **kwargs):
        found.append(fn)
        return run(fn, *args, **kwargs) if GPU else None

    modules = [m for name, m in sys.modules.items() if name.startswith("ling_kernels.ops.") and not GPU]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        for module in (m for m in modules if hasattr(m, "values_on_host")):
            stack.enter_context(mock.patch.object(module, "values_on_host", lambda x: False))
        yield found


def host_seconds(call, calls: int = 200) -> float:
    """CPU seconds of this thread in one call; the GPU is not waited for."""
    for _ in range(10):
        call()
    torch.cuda.synchronize() if GPU else None
    began = time.thread_time()
    for _ in range(calls):
        call()
    taken = time.thread_time() - began
    torch.cuda.synchronize() if GPU else None
    return taken / calls


HOST = {c.op.__name__: c for c in reversed(CASES) if "triton" in c.backends}  # the first Case of each op


@pytest.mark.parametrize("op", sorted(HOST))
def bench_host(benchmark, op):
    """As a ratio to torch's rms_norm of one row, timed between the rounds: the machine's speed cancels. Least of 7."""
    case, fn, w = HOST[op], op_of(HOST[op]), torch.randn(2048, device=DEVICE)
    (shape,) = shapes(case, "small")
    args, ours, torchs = peers.detached(tuple(args_of(case, shape, case.dtypes[0]))), [], []
    with force("triton"), torch.no_grad(), launches() as launched:
        fn(*args, **case.kwargs)
    count = len(launched)
    with force("triton"), torch.no_grad(), nullcontext() if GPU else launches():
        benchmark.group = "host"
        benchmark.pedantic(
            lambda: ours.append(host_seconds(lambda: fn(*args, **case.kwargs))), warmup_rounds=1, rounds=7,
            setup=lambda: torchs.append(host_seconds(lambda: F.rms_norm(w[None], (2048,), w, 1e-6))),
        )  # fmt: skip
    benchmark.extra_info.update(
        host=op,
        launches=count,
        host_us=min(ours) * 1e6,
        ratio=min(ours) / min(torchs),
        torch_us=min(torchs) * 1e6,
    )


# Peers come last: a run that is stopped has our own rows.


def bench_peer(benchmark, case, shape, by, name):
    """Timed if its first result is the reference's up to rounding."""
    bench_op(benchmark, case, shape, by, name)
