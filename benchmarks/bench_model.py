"""pytest benchmarks/bench_model.py: an MoE layer and a full layer (attention and MoE) of Ling-mini, forward and with
its backward, against the per-expert loop of the official code and transformers' eager MoE; and a training step. Real
shapes, also on a CPU, there with few tokens, and for the backward with the experts of one GPU of eight."""

import dataclasses
import functools
import time

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clock import Tick
from benchmarks.models import made_as
from benchmarks.observe import breakdown, peak_memory
from ling_kernels.model import Ling, LingConfig
from ling_kernels.model.transformer import Layer
from ling_kernels.nn import Rows
from ling_kernels.ops.qk_norm_rope import rotate
from ling_kernels.ops.rope_tables import rope_tables
from ling_kernels.ops.route import route
from ling_kernels.train.prepare import peak_flops

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
MINI = dataclasses.replace(LingConfig.mini(), num_hidden_layers=1, first_k_dense_replace=0)
clocked = pytest.mark.benchmark(timer=Tick if GPU else time.perf_counter, group="model")


def ours(part: str, layer: Layer):
    """A function of x, and its weights."""
    if part == "MoE layer":
        return lambda x: layer.mlp(x)[0], [*layer.mlp.parameters()]
    return lambda x: layer(x, rows_of(len(x)))[0], [*layer.parameters()]


def rows_of(T: int) -> Rows:
    """T tokens in sequences of at most 4096."""
    n = min(T, 4096)
    ends = torch.arange(0, T + 1, n, dtype=torch.int32, device=DEVICE)
    tables = rope_tables(n, MINI.rotary_dim, MINI.rope_theta, None, DEVICE)
    return Rows(*tables, torch.arange(T, device=DEVICE) % n, ends)


def loop(part: str, layer: Layer):
    """As the official modeling code: one expert after the other over the tokens that chose it, plain attention."""

    def leaf(w):
        return w.detach().requires_grad_()

    router, bias, shared = leaf(layer.mlp.router.weight), layer.mlp.router.expert_bias, layer.mlp.shared_experts
    experts = [(leaf(a), leaf(b)) for a, b in zip(layer.mlp.experts.gate_up, layer.mlp.experts.down, strict=True)]
    experts.append((leaf(shared.gate_up.weight), leaf(shared.down.weight)))
    weights = [router, *(w for pair in experts for w in pair)]

    def expert(x, w1, w2):
        gate, up = F.linear(x, w1).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2)

    def moe(x):
        scores, chosen, counts = route(F.linear(x.float(), router.float()), bias)
        y = torch.zeros_like(x, dtype=torch.float32)
        for e, n in enumerate(counts.tolist()):
            if n:
                token, k = torch.where(chosen == e)
                y = y.index_add(0, token, expert(x[token], *experts[e]).float() * scores[token, k, None])
        return y.to(x.dtype) + expert(x, *experts[-1])

    if part == "MoE layer":
        return moe, weights
    names = dict(layer.named_parameters())
    own = {name: leaf(w) for name, w in names.items() if not name.startswith("mlp.")}

    def full(x):
        h = x + attention(norm(x, own["input_layernorm.weight"]), rows_of(len(x)), own)
        return h + moe(norm(h, own["post_attention_layernorm.weight"]))

    return full, [*own.values(), *weights]


def norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, MINI.rms_norm_eps)


def attention(x: Tensor, rows: Rows, own: dict) -> Tensor:
    """Of sequences of one length."""
    Hq, Hkv, D = MINI.num_attention_heads, MINI.num_key_value_heads, MINI.head_dim
    qkv = F.linear(x, own["attention.query_key_value.weight"]).unflatten(-1, (-1, D))
    q, k, v = qkv.split([Hq, Hkv, Hkv], 1)
    cos, sin = (t[rows.positions][:, None].to(x.dtype) for t in (rows.cos, rows.sin))
    q = rotate(norm(q, own["attention.query_layernorm"]), cos, sin)
    k = rotate(norm(k, own["attention.key_layernorm"]), cos, sin)
    q, k, v = (t.unflatten(0, (len(rows.cu_seqlens) - 1, -1)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(y.transpose(1, 2).reshape(len(x), Hq * D), own["attention.dense.weight"])


def transformers_eager(part: str, layer: Layer):
    """Its MoE layer with the same routing, Ling's successor's, on the same weights."""
    try:
        from transformers.models.bailing_hybrid.configuration_bailing_hybrid import BailingHybridConfig
        from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridMoE
    except Exception as error:
        pytest.skip(f"transformers: {type(error).__name__}: {error}")
    router, experts, shared = layer.mlp.router, layer.mlp.experts, layer.mlp.shared_experts
    E, H, I = experts.down.shape  # noqa: E741
    config = BailingHybridConfig(
        hidden_size=H, moe_intermediate_size=I, num_local_experts=E, num_experts_per_tok=8, n_group=8, topk_group=4,
        n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "eager"
    with torch.device("meta"):
        theirs = BailingHybridMoE(config)
    gate, up = shared.gate_up.weight.chunk(2)
    own = {
        "gate.weight": router.weight.float(), "gate.e_score_correction_bias": router.expert_bias,
        "experts.gate_up_proj": experts.gate_up, "experts.down_proj": experts.down,
        "shared_experts.gate_proj.weight": gate, "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": shared.down.weight,
    }  # fmt: skip
    theirs.load_state_dict(own, assign=True)
    theirs.eval()
    return lambda x: theirs(x[None])[0], []


@functools.lru_cache(maxsize=1)
def layer_of(E: int) -> Layer:
    """With so many experts; weights of a size that keeps activations near 1."""
    need = 4 * (E + 1) * 3 * MINI.hidden_size * MINI.moe_intermediate_size
    if not GPU and need * 1.5 > free_memory():
        pytest.skip(f"a layer of Ling-mini in fp32 takes {need / 1e9:.1f} GB, more than this machine has free")
    with made_as(DTYPE, DEVICE):
        built = Layer(dataclasses.replace(MINI, num_experts=E), dense=False).eval()
    g = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for p in built.parameters():
            p.normal_(0, p.shape[-1] ** -0.5, generator=g) if p.ndim > 1 else p.fill_(1)
    return built


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    yield
    layer_of.cache_clear()
    torch.cuda.empty_cache()


def free_memory() -> float:
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(s.split()[1]) for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def flops_of(part: str, E: int, T: int) -> float:
    """Forward: two a weight met and token, and causal attention."""
    c = dataclasses.replace(MINI, num_experts=E)
    if part == "MoE layer":
        experts = 3 * c.hidden_size * c.moe_intermediate_size * (c.num_experts_per_tok + c.num_shared_experts)
        return 2 * T * (experts + E * c.hidden_size)
    return T * (c.flops_per_token(min(T, 4096)) / 3 - 2 * c.vocab_size * c.hidden_size)


def passes(fn, weights: list, x: Tensor, which: str):
    """What is timed; its result is y, or the gradient to x."""
    if which == "forward":

        def forward():
            with torch.inference_mode():
                return fn(x)

        return forward
    x, leaves = x.detach().requires_grad_(), [w for w in weights if w.requires_grad]
    cotangent = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(2), device=x.device).to(x.dtype)
    return lambda: torch.autograd.grad(fn(x), [x, *leaves], cotangent, allow_unused=True)[0]


BOTH = "forward and backward"
TOKENS, T_BOTH, E_BOTH = ([64, 8192], 8192, MINI.num_experts) if GPU else ([1, 16, 64], 64, MINI.num_experts // 8)
LAYERS = [
    *(("MoE layer", MINI.num_experts, "forward", T, by) for T in TOKENS for by in (ours, transformers_eager, loop)),
    *(("MoE layer", E_BOTH, BOTH, T_BOTH, by) for by in (ours, loop)),
    *(("full layer", E_BOTH, which, T_BOTH, by) for which in ("forward", BOTH) for by in (ours, loop)),
]


@clocked
@pytest.mark.parametrize(
    "part, E, which, T, by", LAYERS, ids=lambda v: getattr(v, "__name__", str(v)).replace(" ", "-")
)
def bench_layer(benchmark, part, E, which, T, by):
    layer = layer_of(E)
    g = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(T, MINI.hidden_size, generator=g, device=DEVICE).to(DTYPE)
    call, reference = (passes(*f(part, layer), x, which) for f in (by, loop))
    want = reference().float()
    error = ((call().float() - want).norm() / want.norm()).item()
    with peak_memory() as peak:
        call()
    benchmark.pedantic(call, warmup_rounds=1, rounds=50 if GPU else 7 if which == "forward" else 3)
    seconds, flops = benchmark.stats.stats.median, flops_of(part, E, T) * (1 if which == "forward" else 3)
    rate, source = peak_flops(torch.device(DEVICE), DTYPE)
    benchmark.extra_info.update(
        layer=f"{part} of Ling-mini, E = {E}, T = {T}, {str(DTYPE)[6:]}", part=part, which=which, by=by.__name__, T=T,
        threads=torch.get_num_threads(), least_us=benchmark.stats.stats.min * 1e6, error=error,
        tokens_per_s=T / seconds, mfu=flops / seconds / rate, peak=source, peak_memory=peak.bytes,
        breakdown=breakdown(call) if by is ours and T == T_BOTH else None,
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
    with peak_memory() as peak:
        step()
    benchmark.pedantic(step, warmup_rounds=1, rounds=10 if GPU else 5)
    seconds = benchmark.stats.stats.median
    flops = config.flops_per_token(length) * batch * length
    rate, source = peak_flops(torch.device(DEVICE), torch.bfloat16 if GPU else torch.float32)
    benchmark.extra_info.update(
        train_step=f"{'two layers of mini' if GPU else 'tiny'}, {batch} x {length} tokens",
        tokens_per_s=batch * length / seconds, mfu=flops / seconds / rate, peak=source, peak_memory=peak.bytes,
        breakdown=breakdown(step),
    )  # fmt: skip
