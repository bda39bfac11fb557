"""Benchmarks without a GPU: the bytes and FLOPs that they count, a row for every op, small runs of the suites, peers
with wrong results, and the report of pytest-benchmark's JSON. No test depends on a time."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench, models, peers, report, timing
from benchmarks.work import POINTS, Backward, Point, Work, fake_work, forward_work, op_of, shapes, title
from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.gpu import HOPPER
from ling_kernels.model import LingConfig
from ling_kernels.ops import EXPORTS
from tests.cases import CASES, Case, args_of

ROOT = Path(__file__).parents[1]


def case_of(name, **kwargs):
    return next(c for c in CASES if c.op.__name__ == name and c.kwargs == kwargs)


@pytest.mark.parametrize(
    "name, kwargs, which, us",
    [
        ("grouped_gemm_fp8", {}, "forward", 168.7), ("permute_quantize", {}, "forward", 35.9),
        ("unpermute", {}, "forward", 63.1), ("route", dict(scale=1.5), "forward", 1.86),
        ("qk_norm_rope", {}, "forward", 21.2), ("qk_norm_rope", {}, "backward", 31.7),
        ("cross_entropy", {}, "forward", 536.5), ("attention", dict(scale=0.2), "backward", 1389.1),
    ],
)  # fmt: skip
def test_limits_are_those_counted_by_hand(name, kwargs, which, us):
    case = case_of(name, **kwargs)
    assert fake_work(case, case.shapes[-1])[which].seconds(HOPPER["H200"]) * 1e6 == pytest.approx(us, rel=2e-3)


def test_bytes_of_a_grouped_product_do_not_hold_weights_of_idle_experts():
    case, shape = case_of("grouped_gemm_fp8"), dict(S=8, E=4, N=128, K=128, routing="one")
    a, a_scale, b, b_scale, offsets = args = args_of(case, shape, torch.bfloat16)
    with force("torch"):
        work = forward_work(case, shape, args, op_of(case)(*args))
    rows = sum(t.nbytes for t in (a, a_scale, offsets)) + 8 * 128 * 2
    assert work == Work(rows + b.nbytes // 4 + b_scale.nbytes // 4, 2 * 8 * 128 * 128, "fp8")


def test_bytes_of_writes_in_place_and_of_backwards():
    case = case_of("balance_bias_")
    args = args_of(case, dict(E=256), torch.float32)
    assert forward_work(case, dict(E=256), args, op_of(case)(*args)).bytes == 256 * (4 + 4 + 4)
    x = torch.randn(64, requires_grad=True)
    for op, times in ((lambda x: 2 * x, 2), (lambda x: x * x, 3)):  # the second reads its argument again
        backward = Backward(Case(op, op, None, []), {}, (x,))
        assert backward.work.bytes == times * x.nbytes and backward.run()[0].shape == x.shape


@pytest.mark.parametrize("name", ["rms_norm", "permute", "gemm_fp8"])
def test_fake_and_real_arguments_count_alike(name):
    case = case_of(name)
    (shape,) = shapes(case, "small")
    args = args_of(case, shape, case.dtypes[0])
    with force("torch"):
        assert fake_work(case, shape)["forward"] == forward_work(case, shape, args, op_of(case)(*args, **case.kwargs))


def test_the_grid_has_lings_sizes():
    assert {p.T for p in POINTS} >= {1, 131072} and {p.parallel for p in POINTS} == {1, 8, 64}
    p = Point("mini", 8192, 8)
    assert (p.E, p.S, p.F, p.H, p.lengths, p.whole) == (32, 65536, 512, 2048, (4096, 4096), False)
    case = case_of("grouped_gemm_fp8")
    grid = shapes(case, "grid")
    assert grid[0] == case.shapes[-1] and dict(S=64, E=256, N=1024, K=2048, routing="balanced") in grid
    assert fake_work(case, grid[1])["forward"].flops > 0
    names = [title(c, s) for c in CASES for s in shapes(c, "own")]
    assert len({*names}) == len(names)


def test_every_op_has_a_row_for_each_kernel():
    rows = {(case.op.__name__, by, name) for case, _, by, name in (p.values for p in bench.op_rows("own"))}
    assert {op for op, _, _ in rows} >= {*EXPORTS}
    for case in CASES:
        assert {(case.op.__name__, by, "backward") for by in ("torch", *case.backends)} <= rows


def run_bench(tmp_path, *arguments: str) -> dict:
    """pytest-benchmark's JSON, as a user's pytest writes it."""
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "rows.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(out.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ops_and_steps_run_as_they_are_timed(tmp_path):
    """All references at small shapes, forward and backward; training, decoding and serving steps; one op's host."""
    which = "torch-forward or torch-backward or train_step or 8-256 or serve[inf] or host[route] or host[moe]"
    found = run_bench(tmp_path, "benchmarks/bench.py", "--shapes=small", "-k", which, "--commit=abc")
    assert found["commit_info"]["id"] == "abc" and found["machine_info"]["torch"] == torch.__version__
    assert "node" not in found["machine_info"] and not any("data" in b["stats"] for b in found["benchmarks"])
    rows = {b["name"].split("[")[-1].rstrip("]"): b | b["extra_info"] for b in found["benchmarks"]}
    ops = {(r["op"], r["name"]) for r in rows.values() if "case" in r}
    assert {op for op, _ in ops} == {c.op.__name__ for c in CASES} and ("rms_norm", "backward") in ops
    assert all(r["bytes"] > 0 and r["stats"]["median"] > 0 and r["group"] for r in rows.values() if "case" in r)
    assert rows["route"]["launches"] == 1 < rows["moe"]["launches"] and rows["route"]["ratio"] > 0
    assert rows["tiny-fp32-8-256-ours"]["experts_used"] > 1 and rows["tiny-fp32-8-256-ours"]["bytes"] > 1e6
    serve = next(r for r in rows.values() if "serve" in r)
    assert 0 < serve["first_p50_ms"] <= serve["first_p99_ms"] and serve["tokens_per_s"] > serve["requests_per_s"]
    (tmp_path / "rows.json").rename(tmp_path / "cpu.json")
    page = report.measured(tmp_path)
    assert "| `route` | 1 | " in page and "Decoding, tiny fp32, 8 texts of 256 tokens" in page


def test_percentiles():
    assert [bench.percentile([*range(1, 101)], p) for p in (50, 99)] == [50, 99] and bench.percentile([3.0], 1) == 3.0


class Pedantic:
    """The part of pytest-benchmark's fixture that timing.py uses; runs the call once."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, call, setup=None, warmup_rounds=0, rounds=1):
        self.ran = dict(flushed=setup is timing.flush_l2, rounds=rounds, calls=timing.Tick.calls)
        call()


@pytest.mark.parametrize(
    "seconds, captured, want",
    [
        (5e-6, True, dict(timer="graph", rounds=50, calls=30)),
        (5e-6, False, dict(timer="events", rounds=50, calls=1, no_graph="a call asks the host")),
        (0.1, True, dict(timer="events", rounds=5, calls=1)),
    ],
)
def test_a_short_call_is_timed_in_a_graph_and_a_long_one_alone(monkeypatch, seconds, captured, want):
    def graph_of(make):
        if not captured:
            raise RuntimeError("a call asks the host\nmore")
        return SimpleNamespace(replay=lambda: None), 10 * len(make())

    for name, value in dict(is_available=lambda: True, synchronize=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "seconds_of", lambda call: seconds)
    monkeypatch.setattr(timing, "graph_of", graph_of)
    benchmark = Pedantic()
    timing.time_calls(benchmark, lambda: None, lambda: [print] * 3)
    assert benchmark.ran.pop("flushed") and benchmark.ran | benchmark.extra_info == want and timing.Tick.calls == 1


def test_copies_keep_strides_and_gradients():
    args = (torch.randn(4, 8, requires_grad=True), torch.randn(8, 4).T, 3)
    (one, *others) = timing.copies(args, timing.L2 // 2)
    assert one is args and len(others) == 2
    for a, b, n in others:
        assert a.requires_grad and a.is_leaf and torch.equal(a, args[0]) and a.data_ptr() != args[0].data_ptr()
        assert b.stride() == args[1].stride() and n == 3
    assert len(timing.copies(args, 1)) == 64


def test_peers_agree_with_the_reference_or_are_not_timed(monkeypatch):
    for op, name, shape in (("rms_norm", "torch rms_norm", dict(M=3, N=128)),
                            ("grouped_gemm", "torch grouped_mm", dict(S=64, E=4, N=32, K=16))):  # fmt: skip
        case = case_of(op)
        args = peers.detached(tuple(args_of(case, shape, torch.float32)))
        call, error, expected = peers.checked(name, case, args)
        assert error < 1e-5 and torch.allclose(call()[:3], expected[:3], atol=1e-5)
    case, args = case_of("rms_norm"), args_of(case_of("rms_norm"), dict(M=3, N=128), torch.float32)
    monkeypatch.setitem(peers.PEERS["rms_norm"], "wrong", (lambda a: lambda: 1.5 * a.x, ["residual"]))
    monkeypatch.setitem(peers.MODULES, "wrong", "torch")
    with pytest.raises(ValueError, match="differs from the reference's"):
        peers.checked("wrong", case, args)
    with pytest.raises(NotImplementedError, match="residual"):
        peers.checked("wrong", case, (*args[:2], args[0], 0.1))
    monkeypatch.setitem(peers.MODULES, "wrong", "no_such_package")
    with pytest.raises(ImportError, match="no_such_package"):
        peers.checked("wrong", case, args)
    assert peers.inventory()["no_such_package"].startswith("ModuleNotFoundError")


def test_the_layer_agrees_with_the_loop_over_experts(monkeypatch):
    small = dict(hidden_size=64, moe_intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    monkeypatch.setattr(models, "MINI", dataclasses.replace(models.MINI, **small))
    models.random_layer.cache_clear()
    layer, x = models.random_layer(32, torch.float32), torch.randn(24, 64, device=models.DEVICE)
    models.random_layer.cache_clear()
    for backward in (False, True):
        got, want = (models.pass_of(*models.layer_call(by, layer), x, backward)() for by in ("ours", "loop"))
        assert torch.allclose(got, want, atol=1e-4 * want.abs().max())


def test_random_fp8_weights_have_their_size(monkeypatch):
    config = LingConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_experts=8,
                        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=128, head_dim=64,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    monkeypatch.setattr(LingConfig, "preset", lambda name: config)
    model = models.random_model.__wrapped__("small", "fp8")
    experts = model.layers[1].mlp.experts
    assert experts.gate_up.dtype == torch.float8_e4m3fn and model.lm_head.weight.dtype == torch.bfloat16
    wide = experts.gate_up.float() * getattr(experts, "gate_up" + models.SCALES)[0, 0, 0]
    assert wide.std().item() == pytest.approx(config.initializer_range, rel=0.02)
    assert model(torch.arange(8, device=models.DEVICE)[None]).logits.isfinite().all()


def row(us, **extra):
    return dict(stats=dict(median=us / 1e6, min=us / 1e6), extra_info=extra)


def op_row(us, by, **more):
    return row(us, case="rms_norm-M8", op="rms_norm", name="forward", by=by, bytes=48 * 10**6, flops=0,
               precision="bf16", **more)  # fmt: skip


def write_run(folder, gpu=None, *rows, dirty=False, load=0.5):
    machine = dict(gpu=gpu, machine="x86_64", python_version="3.11", cores=2, load=load, peers=dict(quack="no such"))
    found = dict(machine_info=machine, commit_info=dict(id="c" * 40, dirty=dirty), datetime="2026-01-02T03:04:05",
                 benchmarks=[*rows])  # fmt: skip
    (folder / "run.json").write_text(json.dumps(found))


def test_report_of_a_gpu(tmp_path):
    assert "**On a GPU: not measured.**" in report.measured(tmp_path)
    rates = row(1, rate="copy", per_second=4e12), row(1, rate="bf16", per_second=700e12)
    ops = op_row(20.0, "triton"), op_row(30.0, "cuda"), op_row(60.0, "torch"), op_row(40.0, "peer", error=1e-3)
    write_run(tmp_path, "NVIDIA H200", *rates, *ops)
    page = report.measured(tmp_path)
    assert "| `rms_norm-M8` | forward | triton | 20.0 | 2,400 GB/s | 60% | 50% | 3.0x |" in page
    assert "| peer (error 1e-03) |" in page and "| copy | 4.00 | 4.80 | 83% |" in page and "Note" not in page
    assert "(../benchmarks/results/run.json), 2026-01-02" in page and "| `quack` | no such |" in page
    block = report.short(tmp_path)
    assert "| `rms_norm` | `rms_norm-M8` | triton | 20.0 | 50% |" in block and "Speed on H20, H100: **not" in block


def test_report_names_doubtful_figures(tmp_path):
    write_run(tmp_path, "NVIDIA H200", row(1, rate="bf16", per_second=400e12), dirty=True)
    page = report.measured(tmp_path)
    assert "with changes that are not committed" in page and "throttled: 400 TFLOP/s" in page
    write_run(tmp_path)
    assert "load" not in report.measured(tmp_path)
    write_run(tmp_path, load=1.5)
    assert "other programs used this CPU (load 1.5 on 2 cores)" in report.measured(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other.json is not a result of pytest-benchmark"):
        report.measured(tmp_path)


def test_report_gives_ratios_only_of_steps_taken_in_turn(tmp_path):
    alone = [
        row(us, decode="tiny", by=by, tokens_per_s=1.0, kernels_per_layer=None) for us, by in ((3, "ours"), (2, "x"))
    ]
    beside = row(1, beside="tiny", ours_ms=2.0, generate_ms=4.0, ratio=0.5)
    write_run(tmp_path, None, *alone, beside)
    lines = report.measured(tmp_path).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("- Decoding, tiny, ours"))
    assert "over ours" not in "".join(lines[first : first + 2]) and "no comparison" in lines[first + 2]
    assert lines[first + 3].endswith("the median ratio of neighbours is 0.50.")


def test_pages_show_the_committed_results():
    assert report.cut(report.PAGE.read_text(), "measured")[1] == report.measured(), "run python -m benchmarks.report"
    assert report.cut(report.README.read_text(), "performance")[1] == report.short(), "run python -m benchmarks.report"


def test_blocks_are_replaced_between_their_marks_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    report.fill(page, dict(a="new\n"))
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n"
    with pytest.raises(InputError, match="needs one <!-- b -->"):
        report.fill(page, dict(b=""))
