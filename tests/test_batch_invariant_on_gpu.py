"""Kernels, engine and trainer in bf16 with batch_invariant: the bits of a row do not depend on the batch.

On the virtual GPU, or on a GPU: there the tests also show what they take for granted without one, that a wgmma computes
each element of its result alike, whatever its m and n.
"""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.model import Ling, save_model
from ling_kernels.model.sample import Sampling
from ling_kernels.nn import Attention, BatchLayout, RMSNorm
from ling_kernels.nn.batch_invariant import batch_invariant_, product, target_logp
from ling_kernels.nn.fp8 import Fp8Linear, to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from ling_kernels.ops.attention import attention
from ling_kernels.ops.attention_cells import attention_cells
from ling_kernels.ops.attention_decode import KVCache, attention_decode
from ling_kernels.ops.cross_entropy import logsumexp
from ling_kernels.ops.dispatch import dispatch
from ling_kernels.ops.grouped_gemm import grouped_gemm
from ling_kernels.ops.grouped_gemm_fp8 import grouped_gemm_fp8
from ling_kernels.ops.permute import permute
from ling_kernels.ops.qk_norm_rope import qk_norm_rope
from ling_kernels.ops.quantize import quantize, quantize_weight
from ling_kernels.ops.rms_norm import rms_norm
from ling_kernels.ops.rope_tables import rope_tables
from ling_kernels.ops.route import route
from ling_kernels.ops.swiglu import swiglu
from ling_kernels.ops.unpermute import unpermute
from ling_kernels.posttrain.loop import Loop, LoopSettings
from ling_kernels.posttrain.rollout import Answer, rounded_answer_logp
from ling_kernels.tokenizer import Tokenizer
from tests.cases import DEVICE, runs
from tests.engines import ReplayedGraphs
from tests.gpu.__main__ import config_of
from tests.reward_functions import count_spread

BACKENDS = [b for b in ("triton", "cuda") if runs(b)]
if not BACKENDS:
    pytest.skip("no kernel can run here", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
T = 150
SOME = [[5], [0, 1, 2], [*range(40, 57)], [149, 3, *range(20, 84)], [*range(149, 19, -1)]]  # 1, 3, 17, 66, 130 rows


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def experts(x: torch.Tensor) -> torch.Tensor:
    """The routed experts' part of a layer."""
    w = rand(16, 256, seed=2)
    weights, chosen, counts = route(product(x, w, torch.float32), torch.zeros(16, device=DEVICE), None, 4, 2, 4, 2.5)
    plan = dispatch(chosen, counts)
    h = grouped_gemm(permute(x, plan), rand(16, 256, 256, seed=3), plan.offsets, batch_invariant=True)
    h = grouped_gemm(swiglu(h), rand(16, 256, 128, seed=4), plan.offsets, batch_invariant=True)
    return unpermute(h, plan, weights)


def rotated(x: torch.Tensor) -> torch.Tensor:
    ones, tables = torch.ones(128, device=DEVICE), rope_tables(9, 64, 1e4, device=DEVICE)
    q, k, _ = qk_norm_rope(x.view(-1, 4, 64).repeat(1, 1, 2), ones, ones, *tables, x[:, 0].long() % 9, 1)
    return torch.cat([q, k], 1)


def fp8_experts(x: torch.Tensor) -> torch.Tensor:
    """Both products of the experts, the second one to fp32."""
    chosen, counts = route(x[:, :8].float(), torch.zeros(8, device=DEVICE), None, 1, 1, 2)[1:]
    plan = dispatch(chosen, counts)
    first, second = (quantize_weight(rand(8, N, K, seed=N)) for N, K in ((512, 256), (128, 256)))
    h = grouped_gemm_fp8(*quantize(x), *first, plan.offsets, plan, swiglu=True)
    return unpermute(grouped_gemm_fp8(*h, *second, plan.offsets, dtype=torch.float32), plan)


def fp8_product(x: torch.Tensor) -> torch.Tensor:
    layer = Fp8Linear(512, 384).bfloat16().to(DEVICE)
    layer.weight.data.copy_(rand(384, 512, seed=5))
    quantize_for_inference_(layer)
    batch_invariant_(layer)
    return layer(x.repeat(1, 2), RMSNorm(512).to(DEVICE), torch.float32)


OPS = {
    "a product": lambda x: product(x, rand(72, 256, seed=1), torch.bfloat16),
    "logits": lambda x: product(x[:, :200], rand(72, 200, seed=1), torch.float32),
    "experts": experts,
    "norm": lambda x: rms_norm(x, torch.ones(256, device=DEVICE), 2 * x)[0],
    "rotation": rotated,
    "FP8 product": fp8_product,
    "FP8 experts": fp8_experts,
    "FP8 norm": lambda x: torch.cat([y.float() for y in rms_norm(x, rand(256), quantize=True)[1:]], 1),
    "logsumexp": lambda x: logsumexp(x.float()),
    "log-probabilities": lambda x: target_logp(x, rand(72, 256, seed=1), x[:, 0].long() % 9 + 9),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_an_op(backend, name):
    x = rand(T, 256)
    with force(backend), torch.no_grad():
        want = OPS[name](x)
        for rows in SOME:
            assert torch.equal(OPS[name](x[rows]), want[rows]), f"{len(rows)} rows"


def test_products_are_products():
    x, w = rand(T, 200), rand(72, 200, seed=1)
    with force("triton"):
        torch.testing.assert_close(product(x, w, torch.float32), x.float() @ w.float().T, rtol=1e-4, atol=1e-3)


def cells_of(k: torch.Tensor, v: torch.Tensor, page: int = 16) -> tuple[KVCache, torch.Tensor]:
    """A cache with keys and values in pages that lie anywhere, and the pages."""
    pages = -(-len(k) // page)
    cache = KVCache(*(rand(pages + 2, page, *k.shape[1:], seed=9) for _ in range(2)))
    table = torch.randperm(pages + 2, generator=torch.Generator().manual_seed(0))[:pages].int().to(DEVICE)
    slots = (table.long()[:, None] * page + torch.arange(page, device=DEVICE)).flatten()[: len(k)]
    for cells, x in ((cache.k, k), (cache.v, v)):
        cells.view(-1, *x.shape[1:])[slots] = x
    return cache, table


@pytest.mark.parametrize("heads, D", [((4, 2), 32), ((2, 1), 128)])
def test_a_querys_attention(heads, D):
    """In whatever chunk and beside whatever sequences, prefilled or decoded."""
    q, k, v = (rand(T, h, D, seed=i) for i, h in enumerate((heads[0], heads[1], heads[1])))
    with force("triton"):
        want, _ = attention(q, k, v, bounds(T), batch_invariant=True)
        plain, _ = attention(q, k, v, bounds(T))
        torch.testing.assert_close(want, plain)
        for end, n in ((T, 20), (100, 100), (60, 7), (129, 1)):
            beside = [torch.cat([x[:3], x[a:end], x[:5]]) for x, a in ((q, end - n), (k, 0), (v, 0))]
            out, _ = attention(*beside, bounds(3, n, 5), bounds(3, end, 5), batch_invariant=True)
            assert torch.equal(out, torch.cat([want[:3], want[end - n : end], want[:5]]))
        cache, table = cells_of(k, v)
        for n, lengths in ((1, (1, T, 128, 0, 129)), (3, (3, 64, T)), (8, (9, 127))):
            ends = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
            new = torch.stack([q[max(end - n, 0) :][:n] for end in lengths])
            out = attention_cells(new, cache, table.repeat(len(ends), 1), ends)
            for row, end in zip(out, lengths, strict=True):
                assert torch.equal(row, want[end - n : end] if end else torch.zeros_like(row)), (n, end)


def test_other_splits_have_other_bits():
    """Otherwise the test above would show nothing: attention_decode divides the keys by the batch's lengths."""
    k, v = rand(T, 1, 32, seed=1), rand(T, 1, 32, seed=2)
    cache, table = cells_of(k, v)
    q, ends = rand(2, 1, 8, 32), torch.tensor([T, T], dtype=torch.int32, device=DEVICE)
    with force("triton"):
        want = attention_cells(q, cache, table.repeat(2, 1), ends)
        got = attention_decode(q, cache, table.repeat(2, 1), ends)
    torch.testing.assert_close(got, want, rtol=0.02, atol=2e-3)
    assert not torch.equal(got, want)


@pytest.mark.skipif(ON_GPU, reason="reads the PTX of the virtual GPU")
def test_the_compiler_has_no_choice(monkeypatch):
    """Products are wgmma over 16 of K, in each tile; and no sum takes a product that ptxas could fuse with it."""
    from tests.gpu.triton_driver import LAUNCHER

    seen = []
    monkeypatch.setattr(LAUNCHER, "patch", lambda name, text: (seen.append((name, text)), text)[1])
    with force("triton"):
        for rows in (1, 33, 65):
            product(rand(rows, 200), rand(72, 200), torch.float32)
        q, k = rand(8, 4, 32), rand(8, 2, 32)
        attention(q, k, k, bounds(8), batch_invariant=True)
        cache, table = cells_of(k, k)
        attention_cells(q[None], cache, table[None], bounds(8)[1:])
    names = [name for name, _ in seen]
    assert names == ["grouped_gemm_kernel"] * 3 + ["attention_fwd_kernel", "attention_cells_kernel"]
    for name, text in seen:
        assert "mma.sync" not in text.replace("wgmma.mma_async.sync", "")
        assert {*re.findall(r"wgmma\.mma_async\S*?n\d+(k\d+)", text)} == {"k16"}
        if name.startswith("attention"):
            products = {*re.findall(r"\bmul(?:\.ftz)?\.f32\s+(%\w+),", text)}
            terms = re.findall(r"\b(?:add|sub)(?:\.ftz)?\.f32\s+%\w+, (%\w+), (%\w+)", text)
            assert products and terms and not products & {x for pair in terms for x in pair}


def test_a_lane_without_a_sequence_writes_nothing():
    layer = Attention(64, 2, 1, 32).bfloat16().to(DEVICE)
    cache = KVCache(rand(2, 16, 1, 32), rand(2, 16, 1, 32))
    before = [t.clone() for t in cache[:2]]
    table, lengths = torch.tensor([[1], [0]], device=DEVICE).int(), torch.tensor([4, 0], device=DEVICE).int()
    positions = torch.tensor([3, 0], device=DEVICE)
    tables = rope_tables(9, 16, 1e4, device=DEVICE)
    layout = BatchLayout(*tables, positions, bounds(), torch.tensor([19, -1], device=DEVICE), 2, table, lengths)
    with force("triton"), torch.no_grad():
        batch_invariant_(layer)
        layer(rand(2, 64), layout, cache)
    changed = [(a != b).any(-1).flatten().nonzero().flatten().tolist() for a, b in zip(before, cache[:2], strict=True)]
    assert changed == [[16 + 3], [16 + 3]]


@cache
def weights(backend: str) -> Ling:
    """A model with fp32 weights and MTP."""
    vocabulary = 256 if backend == "cuda" else 200  # for an FP8 head
    sizes = dict(vocab_size=vocabulary, num_hidden_layers=2, max_position_embeddings=256)
    m = Ling(replace(config_of(backend), **sizes | ({} if backend == "cuda" else dict(hidden_size=72))))
    m.init_weights(torch.Generator().manual_seed(1))
    for p in m.parameters():
        p.data *= 3 if p.ndim > 1 else 1  # far from uniform
    return m.to(DEVICE)


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(0, 200, (n,), generator=g).tolist() for n in (1, 40, 131, 3, 17)]


def served(
    backend: str, numbers, fp8=False, fp8_head=False, **options
) -> list[tuple[list[int], list[float], list[float]]]:
    """Of these texts: sampled tokens, their log-probabilities and those of the prompt. FP8 weights are quantised from
    the fp32 ones, by `new_weights`."""
    source = weights("cuda" if fp8 else backend)
    m = Ling(source.config).to(DEVICE)
    m.load_state_dict(source.state_dict())
    m.bfloat16()
    if fp8:
        to_fp8(m)
        if fp8_head:
            m.lm_head = Fp8Linear.of(m.lm_head)
        quantize_for_inference_(m)
    options = dict(cache_tokens=700, page_size=16, max_running=len(numbers), batch_invariant=True) | options
    with force(backend):
        e = Engine(m, **options)
        if fp8:
            e.new_weights(source)
        if not ON_GPU:
            e.forward.graphs = ReplayedGraphs(
                e.forward.compute, e.forward.padding_lane, len(e.scheduler.lanes), e.device
            )
        sampling = [Sampling(0.8, top_p=0.9, seed=100 + i) for i in numbers]
        wanted = dict(max_new_tokens=3, stop_token_ids=(), logprobs=1)
        prompts = [texts()[i] for i in numbers]
        requests = e.finish(prompts, sampling, prompt_logprobs=0, **wanted)
        if options["batch_invariant"] and "draft" not in options:  # from the prefix cache
            (again,) = e.finish(prompts[-1:], sampling[-1:], **wanted)
            assert again.cached_tokens > 0 and again.new_tokens == requests[-1].new_tokens
            assert again.logprobs == requests[-1].logprobs
    return [(r.new_tokens, [t.logprob for t in r.logprobs], [t.logprob for t in r.prompt_logprobs]) for r in requests]


@cache
def together(backend: str, fp8: bool = False):
    return served(backend, (0, 3, 1, 4, 2), fp8)


@pytest.mark.parametrize("numbers, options", [
    ((2,), {}), ((1, 4, 2), dict(max_running=2, max_rows=70)), ((0, 1, 4), dict(draft=2, max_running=2)),
], ids=["alone", "chunks", "drafts"])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_on_a_gpu_changes_no_bit(backend, numbers, options):
    want = dict(zip((0, 3, 1, 4, 2), together(backend), strict=True))
    assert served(backend, numbers, **options) == [want[i] for i in numbers]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_on_a_gpu_changes_no_bit_in_fp8(backend):
    """Weights of an engine, those of the head too."""
    want = served(backend, (3, 1, 4), fp8=True, fp8_head=True)
    assert served(backend, (1,), fp8=True, fp8_head=True) == want[1:2]


@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_in_fp8_has_the_bits_of_an_engine_on_a_gpu(backend, wgrad):
    """With fp32 weights, which each quantises for itself, with gradients and without, in another order."""
    new = [(texts()[i], *r) for i, r in zip((0, 3, 1, 4, 2), together(backend, True), strict=True)][::-1]
    m = Ling(weights("cuda").config).to(DEVICE).train()
    m.load_state_dict(weights("cuda").state_dict())
    assert to_fp8(m, wgrad=wgrad)[1] == [], "all layers are FP8"
    answers, want = [Answer(p, ids, [], "length", 0) for p, ids, *_ in new], [x for _, _, y, _ in new for x in y]
    with force(backend):
        batch_invariant_(m, torch.bfloat16)
        logp = rounded_answer_logp(m, answers, torch.bfloat16)
        with torch.no_grad():
            without_gradients = rounded_answer_logp(m, answers, torch.bfloat16)
        assert logp.tolist() == without_gradients.tolist() == want
        logp.sum().backward()
    if backend == BACKENDS[0]:
        plain = Ling(m.config).to(DEVICE)
        plain.load_state_dict(weights("cuda").state_dict())
        to_fp8(plain, wgrad=wgrad)
        with force("torch"):
            rounded_answer_logp(plain, answers, torch.bfloat16).sum().backward()
        for (name, p), q in zip(plain.named_parameters(), m.parameters(), strict=True):
            if not name.startswith("mtp"):
                error = (q.grad - p.grad).norm() / p.grad.norm()
                assert q.grad.dtype == torch.float32 and error < 0.15, (name, error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trainer_has_the_bits_of_an_engine_on_a_gpu(backend):
    """With fp32 weights, which it rounds to bf16, in a packed batch in another order."""
    new = [(texts()[i], *r) for i, r in zip((0, 3, 1, 4, 2), together(backend), strict=True)][::-1]
    m = Ling(weights(backend).config).to(DEVICE).train()
    m.load_state_dict(weights(backend).state_dict())
    with force(backend):
        batch_invariant_(m, torch.bfloat16)
        logp = rounded_answer_logp(m, [Answer(p, ids, [], "length", 0) for p, ids, *_ in new], torch.bfloat16)
        assert logp.tolist() == [x for _, _, logprobs, _ in new for x in logprobs]
        of_prompts = [Answer(p[:1], p[1:], [], "", 0) for p, *_ in new if len(p) > 1]
        with torch.no_grad():
            got = rounded_answer_logp(m, of_prompts, torch.bfloat16)
        assert got.tolist() == [x for *_, logprobs in new for x in logprobs]
        if backend == BACKENDS[0]:
            logp.sum().backward()
    if backend == BACKENDS[0]:
        with force("torch"):
            plain = Ling(m.config).to(DEVICE)
            plain.load_state_dict(weights(backend).state_dict())
            rounded_answer_logp(
                plain, [Answer(p, ids, [], "length", 0) for p, ids, *_ in new], torch.bfloat16
            ).sum().backward()
        for (name, p), q in zip(plain.named_parameters(), m.parameters(), strict=True):
            if p.grad is not None and not name.startswith("mtp"):
                error = (q.grad - p.grad).norm() / p.grad.norm().clamp(min=1e-6)
                assert q.grad.dtype == torch.float32 and error < 0.1, (name, error)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_loop_on_a_gpu_has_no_mismatch(tmp_path, precision):
    backend = "cuda" if precision == "fp8" else "triton"  # whose model has sizes that FP8 needs
    m = Ling(replace(weights(backend).config, vocab_size=320, num_nextn_predict_layers=0))
    m.init_weights(torch.Generator().manual_seed(0))
    save_model(m, tmp_path / "model", dtype=torch.float32)
    Tokenizer().save(tmp_path / "model")
    sizes = dict(prompts=1, samples=2, updates=1, new_tokens=3, steps=2, reward_processes=1)
    with force("triton"):
        settings = LoopSettings(batch_invariant=True, precision=precision, device=DEVICE, **sizes)
        loop = Loop(settings, tmp_path / "model", tmp_path / "run", reward=count_spread)
        records = [loop.step() for _ in range(2)]
        loop.close()
    assert [r["mismatch_max"] for r in records] == [0, 0]
    assert records[0]["grad_norm"] > 0, "the second step is one after an update"


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_switch_the_bits_differ_on_a_gpu(backend):
    got = served(backend, (4, 2), batch_invariant=False)
    want = dict(zip((0, 3, 1, 4, 2), together(backend), strict=True))
    assert [r[1] for r in got] != [want[i][1] for i in (4, 2)]


def test_what_is_refused(tmp_path):
    save_model(weights("triton"), tmp_path / "model", dtype=torch.float32)
    Tokenizer().save(tmp_path / "model")
    both = LoopSettings(batch_invariant=True, replay_routing=True, precision="bf16", device=DEVICE)
    with force(BACKENDS[0]):
        with pytest.raises(InputError, match="--replay-routing with --batch-invariant: trainer and engine choose"):
            Loop(both, tmp_path / "model", tmp_path / "run")
        with pytest.raises(InputError, match=r"for bf16 on a GPU and bf16 or fp32 on a CPU: word_embeddings.weight is"):
            Engine(weights(BACKENDS[0]), batch_invariant=True)
        with pytest.raises(InputError, match="needs a cache in the model's precision"):
            Engine(weights(BACKENDS[0]), cache_dtype=torch.float8_e4m3fn, batch_invariant=True)
