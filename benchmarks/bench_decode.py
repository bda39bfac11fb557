"""pytest benchmarks/bench_decode.py: steps of the engine that only decode, greedily, by texts at once and their length,
of Ling-mini in bf16 and with FP8 weights on a GPU, of the tiny model elsewhere. Weights are random: no download."""

import functools
import time

import pytest
import torch

from benchmarks.clock import Tick
from benchmarks.observe import breakdown, launches
from ling_kernels.generate import Engine
from ling_kernels.generate.plan import step_bytes
from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.frozen import freeze_

GPU = torch.cuda.is_available()
TOKENS = 32
PRECISIONS = ["bf16", "fp8"] if GPU else ["fp32"]
TEXTS = [(1, 16), (1, 4096), (8, 4096), (64, 2048)] if GPU else [(1, 16), (1, 512), (8, 16)]


@functools.lru_cache(maxsize=1)
def model_of(precision: str) -> Ling:
    config, dtype = (LingConfig.mini(), torch.bfloat16) if GPU else (LingConfig.tiny(), torch.float32)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("cuda" if GPU else "cpu"):
            built = Ling(config)
    finally:
        torch.set_default_dtype(before)
    built.init_weights()
    if precision == "fp8":
        to_fp8(built)
        freeze_(built)
    return built.eval()


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    yield
    model_of.cache_clear()
    torch.cuda.empty_cache()


@pytest.mark.benchmark(timer=Tick if GPU else time.perf_counter, group="decode")
@pytest.mark.parametrize("batch, context", TEXTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def bench_decode(benchmark, precision, batch, context):
    """A token of each text; the prompts are read before."""
    model = model_of(precision)
    config, g = model.config, torch.Generator().manual_seed(0)
    prompts = torch.randint(0, min(config.vocab_size, 256), (batch, context), generator=g).tolist()
    engine = Engine(model, cache_tokens=batch * (context + 2 * TOKENS + 64), max_running=batch)
    requests = [engine.submit(p, max_new_tokens=2 * TOKENS, ends=()) for p in prompts]
    while not all(r.new_tokens for r in requests):
        engine.step()
    benchmark.pedantic(engine.step, warmup_rounds=3, rounds=TOKENS - 8)
    assert all(r.finished is None for r in requests), "texts that end leave the batch"
    parts = step_bytes(config, batch, context, precision) if GPU else {}
    benchmark.extra_info.update(
        decode=f"{'mini' if GPU else 'tiny'}, batch {batch}, context {context}, {precision}",
        tokens_per_s=batch / benchmark.stats.stats.median, bytes=int(sum(parts.values())), flops=0, precision="bf16",
        launches_per_layer=launches(engine.step) / config.num_hidden_layers if GPU else None,
        breakdown=breakdown(engine.step) if batch == TEXTS[-1][0] else None,
    )  # fmt: skip
