"""The study of FP8 against bf16, short; its page and its results; and a model without QK-norm, which it needs."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import study_fp8 as study
from benchmarks.blocks import cut
from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.nn import Attention, Rows
from ling_kernels.ops.attention import attention
from ling_kernels.ops.rope_tables import rope_tables
from tests.training import tiniest


def test_short(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "KEEP", 20)
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(study, "RUNS", [("fp8", True, 0), ("bf16", True, 0)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results, settings = tmp_path / "results", replace(study.SETTINGS, steps=40, eval_rows=8, warmup=10)
        study.train_all(results, tmp_path, settings)
        study.measure_all(results, tmp_path)
    finally:
        torch.set_num_threads(threads)
    runs = {name: json.loads((results / f"{name}-norm-0.json").read_text()) for name in ("fp8", "bf16")}
    fp8, bf16 = (run["losses"] for run in runs.values())
    assert len(fp8) == 40 and fp8 != bf16 and fp8[-1] < 0.8 * fp8[0]
    assert runs["fp8"]["data"] == runs["bf16"]["data"] and runs["fp8"]["val_loss"] < fp8[0]
    assert abs(sum(fp8[-10:]) / sum(bf16[-10:]) - 1) < 0.01

    by_step = json.loads((results / "operands.json").read_text())["norm"]["0"]
    assert list(by_step) == ["20", "40"] and len(by_step["40"]) == 4 + 2 + 4
    for operands in by_step["40"].values():
        assert list(operands) == ["w", "x", "xt", "dy", "dyt"]
        assert all(1e-4 < distortion < 1e-3 for _, distortion in operands.values())
    errors = json.loads((results / "gradients.json").read_text())["errors"]["0"]
    assert len(errors) == 4 + 1 + 2
    for layer in errors.values():
        for what, error in layer["fp8"].items():
            assert 3 * layer["bf16"][what] < error < 0.06, what
            assert 1e-3 < layer["bf16"][what] < 6e-3, what

    text = study.tables(*study.load(results))
    assert (
        f"| FP8 | {study.apart({f'{k}-norm-0': v for k, v in runs.items()}, 'fp8-norm-0', 'bf16-norm-0'):+.2%} |"
        in text
    )
    made = (results / "fp8-norm-0.json").stat().st_mtime_ns
    study.train_all(results, tmp_path, settings)  # finished runs are not made again
    assert (results / "fp8-norm-0.json").stat().st_mtime_ns == made


def test_page():
    found = study.load(study.RESULTS)
    page = study.PAGE.read_text()
    assert study.tables(*found) == cut(page, "study_fp8")[1]
    runs = found[0]
    assert {r["settings"]["lr"] for r in runs.values()} == {study.SETTINGS.lr} and study.PICTURE.exists()
    for run in runs.values():
        assert len(run["losses"]) == run["settings"]["steps"] and run["skipped"] == 0
        config = json.loads(json.dumps(study.asdict(study.CONFIG))) | dict(use_qk_norm=run["qk_norm"])
        assert run["config"] == {name: config[name] for name in run["config"]}
    assert len({json.dumps(r["data"]) for r in runs.values()}) == 1


def test_attention_without_norm():
    torch.manual_seed(0)
    layer = Attention(64, 4, 2, 16, qk_norm=False)
    assert [n for n, _ in layer.named_parameters()] == ["query_key_value.weight", "dense.weight"]
    x, cu = torch.randn(9, 64), torch.tensor([0, 4, 9], dtype=torch.int32)
    cos, sin = rope_tables(9, 8, 1e4)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    got = layer(x, Rows(cos, sin, positions, cu))
    q, k, v = layer.query_key_value(x).unflatten(1, (-1, 16)).split([4, 2, 2], 1)
    turn = torch.complex(cos, sin)[positions][:, None]
    rotated = [torch.complex(t[..., :4], t[..., 4:8]) * turn for t in (q, k)]
    q, k = (torch.cat([r.real, r.imag, t[..., 8:]], -1) for r, t in zip(rotated, (q, k), strict=True))
    torch.testing.assert_close(got, layer.dense(attention(q, k, v.contiguous(), cu)[0].flatten(1)))


def test_a_model_without_norm(tmp_path):
    config = replace(tiniest(), use_qk_norm=False)
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # so that attention matters
    save_model(model, tmp_path, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["use_qk_norm"] is False
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.config == config and config.num_parameters(mtp=True) == sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 300, (2, 12))
    want = again(ids).logits
    assert not torch.allclose(want, with_norm(again)(ids).logits, atol=1e-2)
    tokens = torch.stack([*again.stream(ids, 6)], 1)
    longer = again(torch.cat([ids, tokens[:, :-1]], 1)).logits
    torch.testing.assert_close(longer[:, 11:].argmax(-1), tokens)  # a cache holds the same keys


def with_norm(model: Ling) -> Ling:
    new = Ling(replace(model.config, use_qk_norm=True)).eval()
    new.load_state_dict(model.state_dict() | {k: v for k, v in new.state_dict().items() if "query_layernorm" in k
                                              or "key_layernorm" in k})  # fmt: skip
    return new


def test_config_says_whether_there_is_a_norm(tmp_path):
    LingConfig.tiny().to_json(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["use_qk_norm"] is True
    assert LingConfig.from_json(tmp_path / "config.json").use_qk_norm
    (tmp_path / "config.json").write_text('{"use_qk_norm": "no"}')
    with pytest.raises(Exception, match="use_qk_norm"):
        LingConfig.from_json(tmp_path / "config.json")
