"""What the benchmarks count, time and tell, as far as that can be seen without a GPU. Nothing is timed here."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_ops, clock, conftest, limits, peers
from benchmarks.grid import POINTS, Point, shapes, title
from benchmarks.limits import Work, floor
from benchmarks.work import Backward, fake_work, forward_work, op_of, tensors
from ling_kernels.backend import force
from ling_kernels.gpu import HOPPER, named
from tests.cases import CASES, Case, args_of

H200 = HOPPER["H200"]


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
def test_floors_are_what_a_pencil_gives(name, kwargs, which, us):
    case = case_of(name, **kwargs)
    assert floor(fake_work(case, case.shapes[-1])[which], H200) * 1e6 == pytest.approx(us, rel=2e-3)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "permute", "gemm_fp8", "grouped_gemm"])
def test_fake_and_real_arguments_count_alike(name):
    case = case_of(name)
    shape = next(s for s in case.shapes if all(v != 0 for v in s.values()) and "routing" not in s)
    args = args_of(case, shape, case.dtypes[0])
    fake = fake_work(case, shape)
    with force("torch"):
        real = forward_work(case, shape, args, op_of(case)(*args, **case.kwargs))
    assert fake["forward"] == real and real.bytes > 0


def test_what_is_written_in_place_counts_and_a_result_that_is_an_argument_counts_once():
    case = case_of("balance_bias_")
    args = args_of(case, dict(E=256), torch.float32)
    work = forward_work(case, dict(E=256), args, op_of(case)(*args))
    assert work.bytes == 256 * (4 + 4 + 4)  # the bias and the counts are read, the bias is written
    x = torch.randn(64)
    assert forward_work(Case(torch.relu_, torch.relu, None, []), {}, (x,), torch.relu_(x)).bytes == x.nbytes


def test_weights_of_experts_without_rows_do_not_count():
    case, shape = case_of("grouped_gemm_fp8"), dict(S=8, E=4, N=128, K=128, routing="one")
    args = args_of(case, shape, torch.bfloat16)
    with force("torch"):
        work = forward_work(case, shape, args, op_of(case)(*args))
    rest = sum(t.nbytes for t in (args[0], args[1], args[4])) + 8 * 128 * 2
    assert work.bytes == rest + args[2].nbytes // 4 + args[3].nbytes // 4
    assert work.flops == 2 * 8 * 128 * 128 and work.precision == "fp8"


def test_a_backward_counts_what_it_must_read_again():
    def double(x):  # keeps nothing
        return 2 * x

    def square(x):  # keeps its argument
        return x * x

    x = torch.randn(64, requires_grad=True)
    for op, times in ((double, 2), (square, 3)):
        backward = Backward(Case(op, op, None, []), {}, (x,))
        assert backward.work.bytes == times * x.nbytes
        (dx,) = backward.run()
        assert dx.shape == x.shape and torch.equal(dx, backward.run()[0])


def test_every_case_can_be_counted_at_every_point_of_the_grid():
    """Shapes only: that `ling` gives shapes which `make` takes is seen at the smallest of each Case."""
    seen = 0
    for case in CASES:
        found = shapes(case, full=True)
        assert found[0] == case.shapes[-1] and shapes(case, full=False) == found[:1]
        if len(found) > 1:
            smallest = min(found[1:], key=lambda s: s.get("T", 0) or s.get("S", 0) or s.get("M", 0))
            assert fake_work(case, smallest)["forward"].bytes > 0
            seen += 1
    assert seen > 15


def test_the_grid_is_lings():
    assert {p.T for p in POINTS} >= {1, 131072} and {p.parallel for p in POINTS} == {1, 8, 64}
    assert {p.routing for p in POINTS} == {"balanced", "zipf", "one"} and {p.H for p in POINTS} == {2048, 4096, 8192}
    p = Point("mini", 8192, 8)
    assert (p.E, p.S, p.F, p.lengths, p.whole) == (32, 65536, 512, (4096, 4096), False)


def test_titles_tell_cases_apart():
    titles = [title(c, c.shapes[-1]) for c in CASES]
    assert len({*titles}) == len(titles)


@pytest.mark.parametrize("routing", ["balanced", "zipf", "one"])
def test_routings(routing):
    case = case_of("grouped_gemm_fp8")
    offsets = args_of(case, dict(S=4096, E=16, N=128, K=128, routing=routing), torch.bfloat16)[4]
    share = offsets.diff() / 4096
    assert offsets[0] == 0 and offsets[-1] == 4096
    plan = args_of(case_of("permute"), dict(T=512, E=16, topk=2, H=8, routing=routing), torch.float32)[1]
    load = plan.offsets.diff() / 512
    assert load.sum() == 2 and (load.max() > 0.3) == (routing != "balanced")
    busiest = dict(balanced=(0.0625, 0.09), zipf=(0.25, 0.35), one=(1.0, 1.0))[routing]
    assert busiest[0] <= share.max() <= busiest[1]


def test_an_op_that_is_added_is_benchmarked():
    """A Case and nothing else: its work, its names, its torch.compile peer."""
    case = Case(torch.relu, torch.relu, lambda rand, T: (rand(T, 8),), [dict(T=3), dict(T=1000)])
    assert fake_work(case, dict(T=1000))["forward"].bytes == 2 * 1000 * 8 * 2
    assert peers.of(case) == ["torch.compile"]


def test_a_gpu_that_was_not_measured():
    memory, compute = Work(48 * 10**9), Work(1, 10**15, "fp8")
    h20, h100 = HOPPER["H20"], HOPPER["H100"]
    assert limits.predict(0.0125, memory, H200, h100) == pytest.approx(2e-6 + (0.0125 - 2e-6) * 4.8 / 3.35)
    assert limits.predict(0.001, compute, H200, h20) == pytest.approx(2e-6 + (0.001 - 2e-6) * 1978.9 / 296)
    assert limits.predict(1e-6, memory, H200, h20) == 1e-6
    slow = limits.predict(0.1, memory, H200, h20)  # far from its limit: instructions
    assert slow == pytest.approx(2e-6 + (0.1 - 2e-6) * 132 / 78)
    assert named("NVIDIA H100 80GB HBM3").name == "H100" and named("Tesla T4") is None


class FakeBenchmark:
    """Of pytest-benchmark, what the benchmarks use; nothing is timed."""

    def __init__(self):
        self.extra_info, self.ran = {}, None

    def pedantic(self, call, setup=None, warmup_rounds=0, rounds=1):
        self.ran = dict(setup=setup, rounds=rounds, calls=clock.Tick.calls)
        call()


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """A graph that replays nothing, no device to wait for."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "flush_l2", lambda: None)
    return monkeypatch


def test_a_short_kernel_is_timed_in_a_graph(no_gpu_needed):
    no_gpu_needed.setattr(clock, "once", lambda call: 5e-6)
    no_gpu_needed.setattr(
        clock, "graph_of", lambda calls: (SimpleNamespace(replay=lambda: None), len(calls(None)) * 10)
    )
    benchmark = FakeBenchmark()
    assert clock.time_calls(benchmark, lambda n: [print] * (n or 3)) == "graph"
    assert benchmark.ran["calls"] == 30 and clock.Tick.calls == 1


def test_a_long_one_is_timed_alone_and_a_graph_that_fails_is_told(no_gpu_needed):
    def refuses(calls):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    no_gpu_needed.setattr(clock, "graph_of", refuses)
    for seconds, rounds, why in ((1e-3, 50, None), (0.1, 5, None), (5e-6, 50, "operation not permitted")):
        no_gpu_needed.setattr(clock, "once", lambda call, seconds=seconds: seconds)
        benchmark = FakeBenchmark()
        assert clock.time_calls(benchmark, lambda n: [lambda: None]) == "events"
        assert benchmark.ran == dict(setup=clock.flush_l2, rounds=rounds, calls=1)
        assert benchmark.extra_info.get("no_graph", "").startswith(why or "") and bool(benchmark.extra_info) == bool(
            why
        )


def test_a_tick_is_shared_by_the_calls_of_a_graph(no_gpu_needed):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return 6.0

    no_gpu_needed.setattr(torch.cuda, "Event", Event)
    start = clock.Tick()
    assert clock.Tick() - start == 6e-3
    no_gpu_needed.setattr(clock.Tick, "calls", 3)
    assert clock.Tick() - start == 2e-3


def small(case):
    """The first shape that is not empty, among those of the tests."""
    for shape in case.shapes[:-1]:
        args = tuple(args_of(case, shape, case.dtypes[0]))
        if all(t.numel() for t in tensors(args)) and tensors(args):
            return shape, args
    return None, None


def test_every_op_runs_as_it_is_timed(no_gpu_needed):
    """Forward and backward of every Case, in turn on arguments of their own, as a graph would take them."""
    ran = set()

    def call_all(benchmark, calls):
        for call in (*calls(1), *calls(None)[:2]):
            call()
        return "graph"

    no_gpu_needed.setattr(bench_ops, "time_calls", call_all)
    no_gpu_needed.setattr(bench_ops, "copies", lambda args, n: [args, clock.copied(args), clock.copied(args)])
    for case in CASES:
        shape, args = small(case)
        if shape is None or case.op.__name__ in ("cross_entropy", "moe"):  # their shapes are large, or take long
            continue
        for which in ("forward", "backward"):
            if which == "backward" and not any(t.requires_grad for t in tensors(args)):
                continue
            flopless = dataclasses.replace(case, flops=None, bytes=None)
            try:
                info = bench_ops.time_ours(FakeBenchmark(), flopless, shape, args, "torch", which)
            except pytest.skip.Exception:
                continue
            assert info["bytes"] > 0, (case.name, which)
            ran.add((case.op.__name__, which))
    assert len(ran) > 25 and ("rms_norm", "backward") in ran and ("balance_bias_", "forward") in ran


def test_peers_come_last_and_every_kernel_has_its_place():
    found = [p.values for p in bench_ops.sweep(full=False)]
    by = [(case.op.__name__, by, which) for case, _, by, which in found]
    assert ("rms_norm", "cuda", "backward") in by and ("rms_norm", "peer:Liger", "forward") in by
    assert ("rms_norm", "peer:Liger", "backward") not in by and len(by) == len({p.id for p in bench_ops.sweep(False)})
    assert len(bench_ops.sweep(full=True)) > 4 * len(found)

    def item(stem, **params):
        return SimpleNamespace(
            path=Path(f"{stem}.py"), **(dict(callspec=SimpleNamespace(params=params)) if params else {})
        )

    items = [item("bench_ops", by="peer:torch.compile"), item("bench_ops", by="torch"), item("bench_host"),
             item("bench_model", by=print), item("bench_ops", by="cuda")]  # fmt: skip
    assert sorted(items, key=conftest.place) == items[::-1]


def test_copies_keep_strides_and_gradients():
    args = (torch.randn(4, 8, requires_grad=True), torch.randn(8, 4).T, 3)
    (one, *others) = clock.copies(args, clock.L2 // 2)
    assert one is args and len(others) == 2
    for a, b, n in others:
        assert a.requires_grad and a.is_leaf and torch.equal(a, args[0]) and a.data_ptr() != args[0].data_ptr()
        assert b.stride() == args[1].stride() and n == 3
    assert len(clock.copies(args, 1)) == 64 and len(clock.copies(args, 10 * clock.L2)) == 2


def test_a_peer_that_is_not_here_says_why():
    case = case_of("rms_norm")
    args = args_of(case, dict(M=3, N=128), torch.float32)
    assert "ModuleNotFoundError" in peers.absent("no_such_package")
    peers.PACKAGES["nobody"], peers.PEERS["rms_norm"]["nobody"] = "no_such_package", None
    try:
        with pytest.raises(ImportError, match="no_such_package"):
            peers.prepare("nobody", case, args)
        assert "ModuleNotFoundError" in peers.inventory()["no_such_package"]
    finally:
        del peers.PACKAGES["nobody"], peers.PEERS["rms_norm"]["nobody"]


def test_peers_of_torch_agree_and_a_wrong_one_is_seen():
    for name, peer, shape in (("rms_norm", "torch rms_norm", dict(M=3, N=128)),
                              ("cross_entropy", "torch cross_entropy", dict(T=67, V=1000))):  # fmt: skip
        case = case_of(name)
        args = tuple(t.detach() if torch.is_tensor(t) else t for t in args_of(case, shape, torch.float32))
        call, alike = peers.prepare(peer, case, args)
        want = case.ref(*args)
        assert peers.error(call(), want, alike) < 1e-5
        assert peers.error(1.05 * peers.first(call()), want, alike) == pytest.approx(0.05, rel=1e-3)
        with pytest.raises(ValueError, match="differs from the reference's by 5.0e-01"):
            peers.error(1.5 * peers.first(call()), want, alike)
    with pytest.raises(ValueError, match="its result is"):
        peers.error(torch.zeros(2), torch.zeros(3), alike)
    with pytest.raises(NotImplementedError, match="residual"):
        peers.PEERS["rms_norm"]["torch rms_norm"](*args[:2], residual=args[0])


def test_the_time_of_a_wrong_peer_does_not_count(monkeypatch):
    case, shape = case_of("rms_norm"), dict(M=3, N=128)
    args, timed = args_of(case, shape, torch.float32), []
    monkeypatch.setattr(bench_ops, "time_calls", lambda benchmark, calls: timed.append(calls(1)[0]()) or "events")
    for factor, why in ((1.0, None), (1.5, "wrong: ValueError: its result differs from the reference's by 5.0e-01")):
        monkeypatch.setitem(peers.PACKAGES, "wrong", "torch")
        monkeypatch.setitem(peers.PEERS["rms_norm"], "wrong", lambda *args, factor=factor: lambda: (
            factor * torch.nn.functional.rms_norm(args[0], args[1].shape, args[1], args[3])))  # fmt: skip
        if why:
            with pytest.raises(pytest.skip.Exception, match=why):
                bench_ops.time_peer(FakeBenchmark(), case, shape, args, "wrong")
        else:
            assert bench_ops.time_peer(FakeBenchmark(), case, shape, args, "wrong")["error"] < 1e-5
    assert len(timed) == 1


def test_tensors_are_found_in_tuples():
    a, b = torch.zeros(1), torch.zeros(2)
    assert [len(t) for t in tensors((a, (b, None), 3, [a]))] == [1, 2, 1]
