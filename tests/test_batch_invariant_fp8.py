"""Engine and trainer in FP8 and bf16 on a CPU: weights handed over, equal bits with batch_invariant, the loop."""

import copy
from dataclasses import replace
from functools import cache
from random import Random

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.model.checkpoint import named_views
from ling_kernels.nn import RMSNorm
from ling_kernels.nn.batch_invariant import batch_invariant_
from ling_kernels.nn.fp8 import Fp8Linear, to_fp8
from ling_kernels.nn.fp8_inference import SCALES, quantize_for_inference_
from ling_kernels.ops.gemm_fp8 import gemm_fp8
from ling_kernels.ops.grouped_gemm_fp8 import grouped_gemm_fp8
from ling_kernels.ops.quantize import dequantize, quantize, quantize_weight
from ling_kernels.posttrain import Dpo, DpoSettings, Loop, LoopSettings, Problem
from ling_kernels.posttrain.dpo import main as dpo_main
from ling_kernels.posttrain.rollout import Answer, rounded_answer_logp
from ling_kernels.tokenizer import Tokenizer
from tests.reward_functions import count_spread

NEW = dict(max_new_tokens=6, stop_token_ids=(), logprobs=0)


@cache
def master(seed: int = 1) -> Ling:
    """fp32 weights of sizes that FP8 needs, far from uniform."""
    sizes = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=128,
        max_position_embeddings=256, vocab_size=320, num_nextn_predict_layers=1,
    )  # fmt: skip
    m = Ling(replace(LingConfig.tiny(), **sizes))
    m.init_weights(torch.Generator().manual_seed(seed))
    for p in m.parameters():
        p.data *= 3 if p.ndim > 1 else 1
    return m


def engine(fp8: bool, batch_invariant: bool = True, **options) -> Engine:
    """With the master's weights, which it gets after it was made with others."""
    m = copy.deepcopy(master(2)).bfloat16()
    if fp8:
        assert to_fp8(m)[1] == [], "all layers are FP8"
        quantize_for_inference_(m)
    e = Engine(m, **dict(cache_tokens=4000, batch_invariant=batch_invariant) | options)
    e.new_weights(master())
    return e


def trainer(fp8: bool, **options) -> Ling:
    m = copy.deepcopy(master()).train()
    if fp8:
        to_fp8(m, **options)
    batch_invariant_(m, torch.bfloat16)
    return m


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(0, 320, (n,), generator=g).tolist() for n in (1, 3, 16, 65, 130, 5)]


@cache
def alone(fp8: bool) -> list[tuple[list[int], list[float], list[float]]]:
    """Of each text what an engine that serves it alone gives: new tokens, their and the prompt's log-probabilities."""
    e, out = engine(fp8), []
    for text in texts():
        (r,) = e.finish([text], prompt_logprobs=0, **NEW)
        out.append((r.new_tokens, [t.logprob for t in r.logprobs], [t.logprob for t in r.prompt_logprobs]))
    return out


@pytest.mark.parametrize("options", [
    dict(max_running=6), dict(max_running=3, max_rows=9, page_size=4), dict(max_running=4, draft=2, page_size=7),
], ids=["together", "chunks", "drafts"])  # fmt: skip
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_engines_batch_changes_no_bit(fp8, options):
    requests = engine(fp8, **options).finish(texts(), prompt_logprobs=0, **NEW)
    for r, (new, logprobs, of_prompt) in zip(requests, alone(fp8), strict=True):
        assert r.new_tokens == new and [t.logprob for t in r.logprobs] == logprobs
        assert [t.logprob for t in r.prompt_logprobs] == of_prompt


@pytest.mark.parametrize("options", [dict(wgrad="fp8"), dict(wgrad="bf16", recompute="norm_act"), dict(weights="kept")])
@pytest.mark.parametrize("order", [(3, 0, 5, 4, 1, 2), (1,)])
def test_the_trainer_has_the_engines_bits_in_fp8(order, options):
    """With gradients and without, whatever its backward will need."""
    answers = [Answer(texts()[i], *alone(True)[i][:2], "length", 0) for i in order]
    m, want = trainer(True, **options), [x for a in answers for x in a.logprobs]
    logp = rounded_answer_logp(m, answers, torch.bfloat16)
    assert logp.requires_grad and logp.tolist() == want
    with torch.no_grad():
        assert rounded_answer_logp(m, answers, torch.bfloat16).tolist() == want


def test_the_trainer_has_the_engines_bits_in_bf16():
    answers = [Answer(text, *r[:2], "length", 0) for text, r in zip(texts(), alone(False), strict=True)]
    logp = rounded_answer_logp(trainer(False), answers, torch.bfloat16)
    assert logp.tolist() == [x for a in answers for x in a.logprobs]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_without_the_switch_the_bits_differ(fp8):
    """Otherwise the tests above would show nothing."""
    got = engine(fp8, batch_invariant=False, max_running=6).finish(texts(), **NEW)
    pairs = [([t.logprob for t in r.logprobs], want) for r, (_, want, _) in zip(got, alone(fp8), strict=True)]
    assert all(a != b for a, b in pairs), "in each text"
    firsts = [abs(a[0] - b[0]) for a, b in pairs if a[0] != b[0]]
    assert firsts and max(firsts) < 1


def test_rows_of_fp8_products():
    """Values of many sizes, whose sums depend on their order."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 256, generator=g) ** 5, torch.randn(2, 128, 256, generator=g) ** 5
    rows, experts = quantize(x), quantize_weight(w)
    want = [gemm_fp8(*rows, *quantize_weight(each), dtype=torch.float32) for each in w]
    for n in (1, 3, 16, 17):
        few = quantize(x[:n])
        assert torch.equal(gemm_fp8(*few, *quantize_weight(w[0]), dtype=torch.float32), want[0][:n])
        ends = torch.tensor([0, n, 40], dtype=torch.int32)
        got = grouped_gemm_fp8(*rows, *experts, ends, dtype=torch.float32)
        assert torch.equal(got, torch.cat([want[0][:n], want[1][n:]]))


def test_logits_of_an_fp8_head_are_rounded_once():
    layer, norm = Fp8Linear(256, 384, dtype=torch.bfloat16), RMSNorm(256).bfloat16()
    batch_invariant_(layer)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        got, (q, scale) = layer(x, norm, torch.float32), quantize(norm(x))
        want = dequantize(q, scale) @ dequantize(*quantize_weight(layer.weight)).T
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_in_fp8_are_those_of_the_fp8_layers():
    """In fp32 beside them, where sums differ in their order alone, and so some of the codes."""
    plain, pinned = copy.deepcopy(master()), copy.deepcopy(master())
    for m in (plain, pinned):
        to_fp8(m, wgrad="bf16")
    batch_invariant_(pinned)
    ids = torch.tensor(texts()[4])[None]
    for m in (plain, pinned):
        m(ids, labels=ids, logits=False, z_loss=1e-3).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), pinned.parameters(), strict=True):
        assert (q.grad - p.grad).norm() < 0.15 * p.grad.norm(), name


# --- weights handed over


@pytest.mark.parametrize("of", ["a model", "a trainer in FP8", "tensors by official key"])
def test_fp8_weights_are_quantised_from_the_given_ones_in_place(of):
    source = copy.deepcopy(master())
    if of == "a trainer in FP8":
        to_fp8(source)
    e = engine(True)
    state = e.model.state_dict()
    before = [t.data_ptr() for t in state.values()]
    for t in state.values():
        t.view(torch.uint8).fill_(1)  # nothing of the first weights is left
    e.new_weights(dict(named_views(source)) if of == "tensors by official key" else source)
    assert [t.data_ptr() for t in e.model.state_dict().values()] == before
    quantised = 0
    for name, w in source.state_dict().items():
        if (scale := state.get(name + SCALES)) is None:
            assert torch.equal(state[name], w.to(state[name].dtype)), name
            continue
        largest = w.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128)).abs().amax((-3, -1))
        torch.testing.assert_close(scale, largest / 448)
        error = (dequantize(state[name], scale) - w).abs()
        assert (error <= w.abs() / 16 + scale.max() * 2**-10).all(), name  # 3 bits of mantissa; subnormals below 2^-6
        quantised += 1
    assert quantised == 16 and 2 * quantised + len(source.state_dict()) - quantised == len(state)


def test_scales_that_are_powers_of_two_stay_so():
    m = copy.deepcopy(master(2)).bfloat16()
    to_fp8(m, pow2=True)
    quantize_for_inference_(m)
    e = Engine(m, cache_tokens=400)
    e.new_weights(master())
    scale, w = m.layers[0].attention.dense.weight_scale_inv, master().layers[0].attention.dense.weight
    assert torch.equal(scale, 2 ** (w.detach().abs().amax() / 448).log2().ceil().view(1, 1))


def test_weights_that_lack_a_tensor_are_refused():
    views = {k: v for k, v in named_views(master()) if "layers.0.attention.dense" not in k}
    with pytest.raises(InputError, match="of another model: model.layers.0.attention.dense.weight differs"):
        engine(True).new_weights(views)


# --- the loop and preferences


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_model(master(), folder, dtype=torch.float32)
    Tokenizer().save(folder)
    return folder


def letters(random: Random) -> Problem:
    return Problem(random.choice("abc"), "x", "x")


BRIEF = dict(prompts=2, samples=3, updates=2, new_tokens=6, lr=1e-3, reward_timeout=60.0, device="cpu")
TIMED = ("seconds", "tokens_per_s")


def records_of(loop: Loop, steps: int) -> list[dict]:
    records = [{k: v for k, v in loop.step().items() if k not in TIMED} for _ in range(steps)]
    loop.close()
    return records


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_pinned_loop_has_no_mismatch_and_a_resumed_one_its_bits(start, tmp_path, precision):
    settings = LoopSettings(steps=3, precision=precision, batch_invariant=True, kl=0.1, **BRIEF)
    whole = Loop(settings, start, tmp_path / "whole", letters, count_spread)
    assert whole.notes == (["fp8        11 of 11 layers"] if precision == "fp8" else [])
    records = records_of(whole, 3)
    assert [r["mismatch_max"] for r in records] == [0, 0, 0] and all(r["grad_norm"] > 0 for r in records)
    assert not torch.equal(whole.model.lm_head.weight, master().lm_head.weight), "the weights have moved"
    stopped = Loop(settings, start, tmp_path / "stopped", letters, count_spread)
    stopped.step()
    stopped.save()
    stopped.close()
    resumed = Loop.resume(tmp_path / "stopped", problems=letters, reward=count_spread)
    assert records_of(resumed, 2) == records[1:]
    whole.export(tmp_path / "model")
    assert load_model(tmp_path / "model").layers[0].attention.dense.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_loop_in_fp8_without_the_switch_differs_by_rounding(start, tmp_path, lora_rank):
    settings = LoopSettings(steps=2, precision="fp8", lora_rank=lora_rank, **BRIEF)
    records = records_of(Loop(settings, start, tmp_path / "run", letters, count_spread), 2)
    assert all(0 < r["mismatch_mean"] < 0.5 and r["grad_norm"] > 0 for r in records), records


def test_preferences_in_fp8(start, tmp_path):
    """The reference is FP8 as the policy is: nothing is preferred before the first step."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a?", "chosen": "yes", "rejected": "no"}\n')
    options = DpoSettings(data=str(data), pairs=1, steps=2, lr=1e-3, precision="fp8", device="cpu")
    run = Dpo(options, start, tmp_path / "run")
    first, second = run.step(), run.step()
    assert first["margin"] == 0 and second["margin"] > 0 and first["grad_norm"] > 0
    flags = ["--model", str(start), "--data", str(data), "--pairs", "1", "--steps", "1", "--precision", "fp8"]
    assert dpo_main([*flags, "--device", "cpu", "--out", str(tmp_path / "command")]) == 0
