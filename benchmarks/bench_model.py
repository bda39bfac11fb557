"""pytest benchmarks/bench_model.py: one MoE layer against the per-expert loop of the official code and of transformers'
eager model, and a training step. Real Ling shapes, also on a CPU, there with few tokens."""

import dataclasses
import time
from collections import defaultdict

import pytest
import torch
from torch.nn import functional as F

import ling_kernels as lk
from benchmarks.clock import Tick
from ling_kernels.model import Ling, LingConfig
from ling_kernels.train.speed import peak_flops

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
clocked = pytest.mark.benchmark(timer=Tick if GPU else time.perf_counter, group="model")


def weights_of(c: LingConfig) -> tuple:
    """Router, bias, gate and up, down, shared: random, of a size that keeps activations near 1."""
    g = torch.Generator(DEVICE).manual_seed(0)
    H, I, E = c.hidden_size, c.moe_intermediate_size, c.num_experts  # noqa: E741

    def random(*shape, dtype=DTYPE):
        return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0, shape[-1] ** -0.5, generator=g)

    shared = random(2 * I, H), random(H, I)
    return (
        random(E, H, dtype=torch.float32),
        torch.zeros(E, device=DEVICE),
        random(E, 2 * I, H),
        random(E, H, I),
        shared,
    )


def ours(x, router_w, bias, gate_up, down, shared):
    return lambda: lk.moe(x, router_w, bias, gate_up, down, shared)[0]


def loop(x, router_w, bias, gate_up, down, shared):
    """As the official modeling code at inference: one expert after the other over the tokens that chose it."""

    def expert(x, w1, w2):
        gate, up = F.linear(x, w1).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2)

    def call():
        weights, experts, counts = lk.route(F.linear(x.float(), router_w), bias)
        y = torch.zeros_like(x, dtype=torch.float32)
        for e, n in enumerate(counts.tolist()):
            if n:
                token, k = torch.where(experts == e)
                y.index_add_(0, token, expert(x[token], gate_up[e], down[e]).float() * weights[token, k, None])
        return y.to(x.dtype) + expert(x, *shared)

    return call


def transformers_eager(x, router_w, bias, gate_up, down, shared):
    """Its layer with the same routing, Ling's successor's, on the same weights."""
    try:
        from transformers.models.bailing_hybrid.configuration_bailing_hybrid import BailingHybridConfig
        from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridMoE
    except Exception as error:
        pytest.skip(f"transformers: {type(error).__name__}: {error}")
    E, H, I = down.shape  # noqa: E741
    config = BailingHybridConfig(
        hidden_size=H, moe_intermediate_size=I, num_local_experts=E, num_experts_per_tok=8, n_group=8, topk_group=4,
        n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "eager"
    with torch.device("meta"):
        layer = BailingHybridMoE(config)
    own = {
        "gate.weight": router_w, "gate.e_score_correction_bias": bias, "experts.gate_up_proj": gate_up,
        "experts.down_proj": down, "shared_experts.gate_proj.weight": shared[0][:I],
        "shared_experts.up_proj.weight": shared[0][I:], "shared_experts.down_proj.weight": shared[1],
    }  # fmt: skip
    layer.load_state_dict(own, assign=True)
    layer.eval()
    return lambda: layer(x[None])[0]


@pytest.fixture(scope="module")
def weights():
    config = LingConfig.mini()
    need = 4 * (config.num_experts + 1) * 3 * config.hidden_size * config.moe_intermediate_size
    if not GPU and need * 1.5 > free_memory():
        pytest.skip(f"a layer of Ling-mini in fp32 takes {need / 1e9:.1f} GB, more than this machine has free")
    yield weights_of(config)
    torch.cuda.empty_cache()


def free_memory() -> float:
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(s.split()[1]) for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


@clocked
@pytest.mark.parametrize("by", [ours, transformers_eager, loop], ids=lambda f: f.__name__)
@pytest.mark.parametrize("T", [64, 8192] if GPU else [1, 16, 64])
def bench_moe_layer(benchmark, weights, T, by):
    g = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(T, LingConfig.mini().hidden_size, generator=g, device=DEVICE).to(DTYPE)
    with torch.inference_mode():
        call = by(x, *weights)
        y, want = call().float(), loop(x, *weights)().float()
        benchmark.pedantic(call, warmup_rounds=1, rounds=50 if GPU else 7)
    benchmark.extra_info.update(
        moe_layer=f"Ling-mini, T = {T}, {str(DTYPE)[6:]}", by=by.__name__, T=T, threads=torch.get_num_threads(),
        least_us=benchmark.stats.stats.min * 1e6, error=((y - want).norm() / want.norm()).item(),
    )  # fmt: skip


def step_of(config: LingConfig, batch: int, length: int):
    """One training step without an optimizer's choice in it: forward, backward, AdamW."""
    with torch.device(DEVICE):
        model = Ling(config)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 256, (batch, length), device=DEVICE)

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            model(ids, labels=ids, logits=False).loss.backward()
        optimizer.step()
        model.balance_(1e-3)

    return step


@clocked
def bench_train_step(benchmark):
    """Two layers of Ling-mini with its head on a GPU; the tiny model elsewhere."""
    config, batch, length = LingConfig.tiny(), 4, 256
    if GPU:
        config, batch, length = dataclasses.replace(LingConfig.mini(), num_hidden_layers=2), 2, 4096
    step = step_of(config, batch, length)
    step()
    torch.cuda.reset_peak_memory_stats() if GPU else None
    benchmark.pedantic(step, warmup_rounds=1, rounds=10 if GPU else 5)
    seconds = benchmark.stats.stats.median
    flops = config.flops_per_token(length) * batch * length
    peak, source = peak_flops(torch.device(DEVICE), torch.bfloat16 if GPU else torch.float32)
    benchmark.extra_info.update(
        train_step=f"{'two layers of mini' if GPU else 'tiny'}, {batch} x {length} tokens",
        tokens_per_s=batch * length / seconds, mfu=flops / seconds / peak, peak=source,
        peak_memory=torch.cuda.max_memory_allocated() if GPU else None, breakdown=breakdown(step) if GPU else None,
    )  # fmt: skip


def breakdown(step, most: int = 12) -> dict[str, float]:
    """Microseconds of the GPU by kernel, the largest; the rest together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spent = defaultdict(float)
    for event in profile.key_averages():
        spent[event.key[:60]] += event.self_device_time_total
    ordered = sorted(spent.items(), key=lambda pair: -pair[1])
    return dict(ordered[:most]) | {"others": sum(us for _, us in ordered[most:])}
