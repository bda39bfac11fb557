"""bench_decode and serving on the tiny model, in moments: what they count, whom they call, what they print."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_decode, observe, serving
from benchmarks.models import random_model, without_mtp
from benchmarks.peers import engines
from ling_kernels.generate import Engine
from ling_kernels.model import LingConfig
from ling_kernels.nn.frozen import SCALES
from ling_kernels.op import E4M3
from tests import stand_ins
from tests.stand_ins.engines import GIVEN

pytestmark = pytest.mark.skipif(bench_decode.GPU, reason="looks at what a CPU tells")


@pytest.fixture(scope="module")
def tiny():
    return random_model(without_mtp("tiny"), "fp32", "cpu")


def run(monkeypatch, capsys, module, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["benchmark", *args])
    assert module.main() == 0
    return capsys.readouterr().out


def test_ours_in_moments(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.json"
    sizes = ["--batches", "1", "3", "--contexts", "0", "20", "--tokens", "2"]
    said = run(monkeypatch, capsys, bench_decode, "--by", "ours", *sizes, "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 0), (3, 0), (1, 20), (3, 20)]
    for r in rows:
        assert 0 < r["tokens_per_s"] and r["share"] == pytest.approx(r["tokens_per_s"] / r["bound"])
        assert (4 if r["batch"] == 1 else 5) <= r["experts_met"] + (r["batch"] == 1) <= 12 and r["parts"]
    assert len(re.findall(r"^tiny fp32 .* ours +[\d,]+ +[\d.]+ +[\d,]+ +[\d.]+%$", said, re.M)) == 4
    assert "a copy, measured" in said and "One step of ours" in said


def test_one_that_is_not_here_says_why(monkeypatch, capsys):
    monkeypatch.setitem(bench_decode.OTHERS, "vLLM", "no_such_package")
    said = run(monkeypatch, capsys, bench_decode, "--by", "vLLM", "--batches", "1", "--contexts", "0")
    assert re.search("not timed: vLLM, tiny in fp32: .*no_such_package", said)


def test_what_a_gpu_cannot_hold_is_told(monkeypatch, capsys):
    monkeypatch.setattr(bench_decode, "fits", lambda name, precision, batch, context: batch * context < 9)
    sizes = ["--batches", "1", "2", "--contexts", "0", "8", "--tokens", "1"]
    said = run(monkeypatch, capsys, bench_decode, "--by", "ours", *sizes)
    assert "not timed: ours, tiny in fp32, 2 texts of 8: more than this GPU's memory" in said
    assert said.count("tiny fp32") == 3 + 3, "in either table"


def test_transformers_writes_what_ours_does(tiny):
    pytest.importorskip("transformers")
    generate = engines.transformers_generate(tiny)
    prompts = bench_decode.prompts_of(320, 3, 20)
    assert generate(prompts, 10) == Engine(tiny).generate(prompts, max_new_tokens=10, ends=())
    assert bench_decode.by_difference(generate, prompts, 2) != 0  # less than none where the machine is busy


def test_other_weights_are_seen(tiny, monkeypatch):
    pytest.importorskip("transformers")
    right = engines.of_mlp

    def exchanged(name, mlp):
        (gate, g), (up, u), down = right(name, mlp)
        return (gate, 5 * u), (up, g), down

    monkeypatch.setattr(engines, "of_mlp", exchanged)
    with pytest.raises(ValueError, match="differ from ours"):
        engines.transformers_generate(tiny)


@pytest.mark.parametrize("start", [engines.vllm_generate, engines.sglang_generate])
def test_others_are_called_as_they_expect(monkeypatch, tmp_path, start):
    stand_ins.install(monkeypatch)
    folder = engines.folder_of(without_mtp("mini"), True, tmp_path)
    generate = start(folder, 64, 8)
    assert bench_decode.by_difference(generate, [[1, 2], [3, 4]], 4) != 0
    assert (GIVEN["length"], GIVEN["running"], GIVEN["shares"]) == (64, 8, False)
    assert GIVEN["architectures"] == ["BailingMoeV2ForCausalLM"] and GIVEN["num_nextn_predict_layers"] == 0
    assert GIVEN["quantization_config"]["weight_block_size"] == [128, 128]


def test_fewer_tokens_than_were_asked_for_are_seen():
    with pytest.raises(ValueError, match="wrote"):
        bench_decode.by_difference(lambda prompts, new: [[1] * 8 for _ in prompts], [[1]], 4)


def test_the_bound_is_that_of_the_plan(monkeypatch):
    monkeypatch.setattr(bench_decode, "bandwidth", lambda: (4.8e12, "H200's data sheet"))
    row = dict(model="mini", precision="fp8", batch=1, context=-bench_decode.WARM, by="vLLM", tokens_per_s=1640.0)
    bench_decode.bounded([row], 0)
    assert row["bound"] == pytest.approx(3281, rel=0.02) and row["share"] == pytest.approx(0.5, rel=0.02)
    few = [row | dict(batch=64), row | dict(batch=64, by="ours", experts_met=8.0)]
    bench_decode.bounded(few, 0)
    assert few[0]["bound"] == few[1]["bound"] > 60 * row["bound"], "all 64 met the same 8 experts"


def test_what_fits(monkeypatch):
    monkeypatch.setattr(bench_decode, "GPU", True)
    memory = SimpleNamespace(total_memory=141e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    assert bench_decode.fits("flash", "fp8", 64, 4096) and not bench_decode.fits("flash", "bf16", 1, 0)
    memory.total_memory = 80e9
    assert not bench_decode.fits("flash", "fp8", 1, 0) and bench_decode.fits("mini", "bf16", 64, 4096)


def test_experts_that_are_met(tiny):
    ids = list(range(40))
    met = bench_decode.experts_met(tiny, [ids, ids])
    assert met == 4 == bench_decode.experts_met(tiny, [ids])
    assert 4 < bench_decode.experts_met(tiny, [ids, ids[::-1], ids[7:20]]) <= 12


def test_a_step_by_parts():
    spent = dict(qk_norm_attention_decode_kernel=3.0, gemm_fp8_kernel=2.0, grouped_gemm_fp8_kernel=5.0, nvjet_tst=1.0,
                 rms_norm_fwd_kernel=1.5, Memcpy=0.5, route_kernel=0.7, who=0.1)  # fmt: skip
    parts = observe.Profile(spent, 8, 3).parts(bench_decode.PARTS)
    assert parts == {"experts": 5.0, "attention": 3.0, "other products": 3.0, "norms, quantisation": 1.5,
                     "router": 0.7, "copies": 0.5, "others": 0.1}  # fmt: skip
    assert list(parts)[0] == "experts" and list(parts)[-1] == "others"
    told = observe.profile(lambda: torch.ones(64, 64) @ torch.ones(64, 64))
    assert told.parts(bench_decode.PARTS)["other products"] > 0 and (told.kernels, told.calls) == (0, 0)


def test_random_fp8_weights_have_their_size():
    config = LingConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_experts=8,
                        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=128,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    model = random_model(config, "fp8", "cpu", head="fp8")
    kinds = {str(w.dtype) for w in model.parameters() if w.ndim > 1}
    assert kinds == {"torch.float8_e4m3fn", "torch.bfloat16"} and model.lm_head.weight.dtype == E4M3
    experts = model.layers[1].mlp.experts
    wide = experts.gate_up.float() * getattr(experts, "gate_up" + SCALES)[0, 0, 0]
    assert wide.std().item() == pytest.approx(config.initializer_range, rel=0.02)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_serving_in_moments(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.json"
    said = run(monkeypatch, capsys, serving, "--rates", "200", "inf", "--requests", "4", "--prompt", "8", "--new", "4",
               "--out", str(out))  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [r["rate"] for r in rows] == ["200.0", "inf"] and len(said.splitlines()) == 4
    assert all(0 < r["first_p50"] <= r["first_p99"] and 0 < r["requests_per_s"] < r["tokens_per_s"] for r in rows)


def test_what_serving_tells():
    times = [[0.0, 1.0, 2.0, 4.0], [1.0, 1.5, 1.75]]
    told = serving.told(times)
    assert told["requests_per_s"] == 2 / 4 and told["tokens_per_s"] == 5 / 4
    assert (told["first_p50"], told["first_p99"]) == (0.5, 1.0)
    assert (told["between_p50"], told["between_p99"]) == (1.0, 2.0)
    assert serving.share([1.0], 0.01) == 1.0 and math.isclose(serving.share([*range(1, 101)], 0.99), 99)
    asked = serving.requests_of(LingConfig.tiny(), 50, 8, 4, 0)
    assert {len(p) for p, _ in asked} == {*range(4, 13)} and {n for _, n in asked} == {*range(2, 7)}
