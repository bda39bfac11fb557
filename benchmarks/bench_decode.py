"""pytest benchmarks/bench_decode.py: greedy decoding, by tokens, of Ling-mini on a GPU, of the tiny model elsewhere."""

import time

import pytest
import torch

from benchmarks.clock import Tick
from benchmarks.limits import Work
from benchmarks.work import bytes_per_token
from ling_kernels.model import Ling, LingConfig

GPU = torch.cuda.is_available()
TOKENS = 32


@pytest.fixture(scope="module")
def model() -> Ling:
    config, dtype = (LingConfig.mini(), torch.bfloat16) if GPU else (LingConfig.tiny(), torch.float32)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("cuda" if GPU else "cpu"):
            built = Ling(config)
    finally:
        torch.set_default_dtype(before)
    built.init_weights()
    yield built.eval()
    torch.cuda.empty_cache()


@pytest.mark.benchmark(timer=Tick if GPU else time.perf_counter, group="decode")
@pytest.mark.parametrize("batch, context", [(1, 16), (1, 4096 if GPU else 512), (8, 16)])
def bench_decode(benchmark, model, batch, context):
    """One token of each sequence; the prompt is read before."""
    config, device = model.config, model.lm_head.weight.device
    g = torch.Generator(device).manual_seed(0)
    prompt = torch.randint(0, min(config.vocab_size, 256), (batch, context), generator=g, device=device)
    tokens = model.stream(prompt, TOKENS)
    for _ in range(4):
        next(tokens)
    benchmark.pedantic(next, (tokens,), rounds=TOKENS - 8)
    seconds = benchmark.stats.stats.median
    work = Work(bytes_per_token(config, batch, context, model.lm_head.weight.element_size()))
    benchmark.extra_info.update(
        decode=f"{'mini' if GPU else 'tiny'}, batch {batch}, context {context}, {str(model.lm_head.weight.dtype)[6:]}",
        tokens_per_s=batch / seconds, bytes=work.bytes, flops=0, precision="bf16",
    )  # fmt: skip
