"""`plan pipeline`: units against the model and `plan train`, the search against all layouts, files, bad input."""

import itertools
import json
import shlex
from dataclasses import replace

import pytest

from ling_kernels.gpu import Gpu
from ling_kernels.model import LingConfig
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.parallel.schedules import check, read_csv, schedule_order
from ling_kernels.plan import meshes, pipeline
from ling_kernels.plan.__main__ import main
from ling_kernels.plan.greedy import greedy_order
from ling_kernels.plan.memory import RESERVE, plan_training
from ling_kernels.plan.processes import held_by_processes
from ling_kernels.plan.search import Problem, candidates, search
from ling_kernels.plan.simulate import Times, simulate
from ling_kernels.plan.train_time import total, unit
from ling_kernels.plan.units import Gpus, Unit, letters, predicted_units, rank_share, rank_units, stage_work
from ling_kernels.train.prepare.checks_parallel import stages_of
from ling_kernels.train.settings import Settings
from tests.test_plan_time import micro_batch

GPU = Gpu("test", 1e9, 1e9, 1e12, 2e12, 1, 1e9)
TINY = replace(LingConfig.tiny(), num_nextn_predict_layers=1)
SETTINGS = Settings(batch=2, micro_batch=2, seq_len=32, mtp=1, precision="bf16")


def times_problem(times, pp, micro_batches, memory=1e30):
    """A model of t layers, whose units take these times."""
    units = {k: Unit(Times(*times.get(k, (0, 0, 0))), (), 1e6) for k in "EdtnmL"}
    config = replace(TINY, num_hidden_layers=6, first_k_dense_replace=1)
    return Problem(config, SETTINGS, units, Gpus(pp=pp), micro_batches, 0.0, memory)


def test_units_are_the_models_and_plan_trains():
    units = predicted_units(TINY, SETTINGS, GPU, 1)
    layout = PipelineLayout(("E" + "t" * TINY.num_hidden_layers + "mL",))
    (held,) = rank_units(layout, [0], TINY)
    plain, experts, *_ = rank_share(held, units, Gpus())
    assert plain + experts == TINY.num_parameters(mtp=True)
    (whole,) = stage_work(layout, TINY, units)
    assert whole.times.total == pytest.approx(total(micro_batch(TINY, SETTINGS), GPU))
    assert units["L"].times.of("B") == 0 < units["L"].times.forward and units["E"].times.total == 0
    kept = plan_training(TINY, SETTINGS).kept_bytes
    assert whole.kept == pytest.approx(kept["activations"] + kept["loss"], rel=0.02)


def test_received_rows_are_kept():
    """With half of the experts a layer keeps the rows that it receives, in bf16, as it keeps its own with all."""
    c, s = replace(TINY, num_nextn_predict_layers=0), replace(SETTINGS, mtp=0, master="bf16", optimizer="adamw8bit")
    whole, half = (predicted_units(c, s, GPU, ep)["t"].kept for ep in (1, 2))
    assert half == pytest.approx(whole, rel=0.02)


def test_recomputed_mtp_layers():
    """Less is kept of them alone, and their forward comes again."""
    s = replace(SETTINGS, recompute_mtp=True)
    for ep in (1, 2):
        (before, t, m), (after, t2, m2) = ((units, units["t"], units["m"]) for units in (
            predicted_units(TINY, SETTINGS, GPU, ep), predicted_units(TINY, s, GPU, ep)))  # fmt: skip
        assert after == before | dict(m=m2) and t2 == t and m2.kept < m.kept - t.kept / 2
        forward = total(unit(TINY, s, "t", TINY.num_experts // ep).forward, GPU)
        assert m2.times.input_gradient == pytest.approx(m.times.input_gradient + forward)
        assert m2.times.exchange_back == ep * m.times.exchange_back


def test_parameters_of_ranks():
    """The embedding is beside m, too; a head of two losses on one rank is one."""
    units = predicted_units(TINY, SETTINGS, GPU, 1)
    layout, V = PipelineLayout.parse("Et|tt|tm|L|L"), TINY.vocab_size * TINY.hidden_size
    assert letters(layout, TINY) == ["Ed", "tt", "tm", "L", "L"]

    def number(ranks: list[int]) -> int:
        shares = [rank_share(held, units, Gpus()) for held in rank_units(layout, ranks, TINY)]
        return sum(share.plain + share.experts for share in shares)

    assert number([0, 1, 2, 1, 2]) == TINY.num_parameters(mtp=True) + 2 * V
    assert number([0, 1, 2, 0, 0]) == TINY.num_parameters(mtp=True) + V


@pytest.mark.parametrize("schedule", ["1F1B", "greedy"])
def test_the_search_finds_the_best_of_all_layouts(schedule):
    problem = times_problem(dict(d=(1, 1, 1), t=(2, 2, 2), m=(3, 3, 2), L=(4, 0, 0)), 3, 6)
    last = len(problem.atoms) - 1
    every = itertools.combinations_with_replacement(range(1, last + 1), 2)
    best = min(problem.score(cuts, schedule) for cuts in every)
    found = search(problem, [(schedule, 3)], tries=150)[0]
    assert found.timeline.seconds == best
    together = search(problem, [(schedule, 3)], tail=2, tries=150)[0]
    assert together.layout.stages[-1].endswith("L") and "L" not in "".join(together.layout.stages[:-1])


def test_memory_is_kept():
    """1F1B has two micro batches of five units in flight on rank 0: where 10 are too much, the layout is another."""
    free = times_problem(dict(t=(1, 1, 1), d=(1, 1, 1), m=(1, 1, 1), L=(1, 0, 0)), 2, 8)
    fastest = search(free, [("1F1B", 2)], tries=60)[0]
    assert str(fastest.layout) == "Etttt|ttmL" and (fastest.peak - RESERVE) // 1e6 == 10
    (less,) = search(replace(free, memory=RESERVE + 9e6), [("1F1B", 2)], tries=60)
    assert str(less.layout) == "Ettt|tttmL" and (less.peak - RESERVE) // 1e6 == 8
    assert less.timeline.seconds > fastest.timeline.seconds
    several = search(replace(free, memory=RESERVE + 9e6), candidates(2, [1]), tries=60)
    assert [r.peak <= RESERVE + 9e6 for r in several] == sorted(
        (r.peak <= RESERVE + 9e6 for r in several), reverse=True
    )


def test_greedy_orders_are_complete_and_keep_the_limit():
    ranks, times = [0, 1, 2, 0, 1, 2], [Times(1, 1, 1), Times(2, 2, 1), *[Times(1, 1, 1)] * 3, Times(3, 1, 0)]
    usual = simulate(schedule_order("Interleaved1F1B", 3, 6, 9), times, 0.1)
    kept = [1.0, 2.0, 1.0, 1.0, 3.0, 1.0]
    limit = [1.5 * usual.peak(r, kept) for r in range(3)]
    order = greedy_order(ranks, times, 9, kept, limit, transfer=0.1)
    assert check(order, 3, 6, 9) == ranks
    line = simulate(order, times, 0.1)
    assert all(line.peak(r, kept) <= limit[r] for r in range(3)) and line.seconds < usual.seconds


def test_the_command(tmp_path, capsys):
    csv, png = tmp_path / "order.csv", tmp_path / "step.png"
    flags = "pipeline --model tiny --mtp 1 --batch 8 --micro-batch 2 --seq-len 32 --precision bf16 --pp 2".split()
    assert main([*flags, "--tries", "20", "--csv", str(csv), "--png", str(png)]) == 0
    out = capsys.readouterr().out
    layout = next(line.split()[1] for line in out.splitlines() if line.startswith("layout"))
    schedule = next(line.split()[1] for line in out.splitlines() if line.startswith("schedule"))
    assert "Predicted, nothing measured" in out and "tried" in out and png.read_bytes()[:4] == b"\x89PNG"
    order = read_csv(csv)
    check(order, 2, layout.count("|") + 1, 4)
    assert main([*flags, "--pipeline", layout, "--schedule", str(csv)]) == 0
    again = capsys.readouterr().out
    wanted = [line for line in out.splitlines() if line.startswith(("step", "memory"))]
    assert all(line in again for line in wanted) and f"schedule  {csv}" in again and schedule


def test_modules_for_torchtitan(tmp_path, capsys):
    assert PipelineLayout.parse("Et|tt||tmmL").modules() == [
        ["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], [],
        ["layers.3", "mtp_layers.0", "tok_embeddings", "mtp_layers.1", "norm", "lm_head"],
    ]  # fmt: skip
    assert PipelineLayout.parse("EtmL").modules() == [["tok_embeddings", "layers.0", "mtp_layers.0", "norm", "lm_head"]]
    file = tmp_path / "modules.json"
    flags = f"pipeline --model tiny --mtp 1 --batch 8 --micro-batch 2 --seq-len 32 --pp 2 --tries 5 --modules {file}"
    assert main(flags.split()) == 0
    layout = next(line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("layout"))
    assert json.loads(file.read_text()) == PipelineLayout.parse(layout).modules()


@pytest.mark.parametrize("flags, message", [
    ("--pp 0", "--pp 0: it must be at least 1"), ("", "give --pp, the ranks of the pipeline, or --gpus"),
    ("--pp 2 --tries 0", "--tries 0"), ("--pp 2 --memory 0", "--memory 0.0"),
    ("--pp 2 --dp 3", "not a multiple of --dp 3"),
    ("--pp 2 --ep 3 --batch 12", "--ep 3 does not divide the 16 experts"),
    ("--pp 2 --dp 4 --ep 8", "--ep 8 does not divide --dp 4"),
    ("--pp 2 --pipeline Et|L", "has 4 layers"), ("--pp 2 --pipeline Et|x", "'x' is none of"),
    ("--pp 2 --pipeline Et|t|ttmL --mtp 1", "3 stages on 2 ranks"), ("--pp 2 --schedule zb", "or a file"),
    ("--pp 2 --vpp 1 --pipeline Et|t|t|tmL --mtp 1", "4 stages are not --pp 2 x --vpp 1"),
    ("--pp 2 --schedule 1F1B --vpp 2", "has another number of stages"),
    ("--pp 2 --schedule DualPipeV --batch 2", "at least as many microbatches"),
    ("--pp 2 --batch 4000000 --micro-batch 1", "too many to simulate"), ("--pp 2 --gpu A100", "invalid choice"),
    ("--pp 2 --csv /no/folder/x", "--csv /no/folder/x: there is no folder"),
    ("--pp 2 --png /", "--png /: it is a folder"),
    ("--pp 2 --mtp 1 --pipeline Ettt|t|m|LL --modules x", "--modules: torchtitan has all of m and L in the last"),
    ("--pp 2 --csv ./", "--csv ./: it is a folder"), ("--gpus 0", "--gpus 0: it must be at least 1"),
    ("--gpus 3", "--gpus 3: nothing divides --batch 8 and 16 experts so"),
    ("--gpus 4 --pp 2 --dp 4", "--gpus 4 --pp 2 --dp 4: nothing divides"),
    ("--gpus 4 --schedule greedy", "--schedule greedy with --gpus: it must be one of Interleaved1F1B"),
    ("--gpus 4 --memory 6", "--gpus: no plan fits 6.00 GB: the least that was found is 6.0"),
])  # fmt: skip
def test_bad_input_is_one_line(flags, message, capsys, monkeypatch):
    if "--csv" in flags or "--png" in flags:  # found before any work
        monkeypatch.setattr(pipeline, "make_problem", None)
    given = "--tries 2" if "--tries" not in flags else ""
    batch = "" if "--batch" in flags else "--batch 8"
    micro = "" if "--micro" in flags else "--micro-batch 2"
    code = main(["pipeline", *f"--model tiny --seq-len 32 {micro} {batch} {given} {flags}".split()])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("given", [
    dict(model="flash", batch=512, dp=16, ep=8, pp=4, pipeline="Et*8|t*8|t*9|t*7,L", optimizer="adamw8bit",
         master="bf16", precision="bf16"),
    dict(model="tiny", mtp=1, batch=24, dp=6, ep=2, pp=2, pipeline="Et|tt|tm|L", optimizer="muon"),
    dict(model="tiny", mtp=1, batch=16, dp=4, ep=4, pp=2, pipeline="Ett||tt|mL", schedule="ZBVZeroBubble"),
])  # fmt: skip
def test_weights_gradients_and_optimizer_are_plan_trains(given):
    """Of the fullest process of each stage, to the byte."""
    s = Settings(micro_batch=1, seq_len=64, **given)
    config = replace(getattr(LingConfig, s.model)(), num_nextn_predict_layers=s.mtp or 0)
    layout, schedule, ep = stages_of(s, config), s.schedule or "Interleaved1F1B", s.ep
    held, each = held_by_processes(config, s), s.dp
    of_stage = [held[first : first + each] for first in range(0, len(held), each)]
    if len(layout.stages) == s.pp:
        schedule = "1F1B"
    problem = Problem(config, s, predicted_units(config, s, GPU, ep), Gpus(s.dp, ep, s.pp), s.batch // s.dp, 0.0)
    usage = problem.evaluate(layout, schedule).usage
    assert [u.plain + u.experts for u in usage] == [row[0].parameters for row in of_stage]
    assert [u.state for u in usage] == [max(h.weights + h.gradients + h.optimizer for h in row) for row in of_stage]


def test_the_best_mesh(capsys, monkeypatch):
    """Against all meshes, each with a search of its own; the trainer takes the flags of all that are shown."""
    flags = "--model tiny --mtp 1 --batch 16 --micro-batch 2 --seq-len 32 --precision bf16"
    found = []
    best = meshes.best_meshes
    monkeypatch.setattr(pipeline, "best_meshes", lambda *given: found.append((given, best(*given))) or found[-1][1])
    assert main(["pipeline", *flags.split(), "--gpus", "4", "--tries", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ((problems, solve, tries, gpu), plans), *_ = found
    assert sorted((p.gpus.dp, p.gpus.ep, p.gpus.pp) for p in problems) == [
        (1, 1, 4), (2, 1, 2), (2, 2, 2), (4, 1, 1), (4, 2, 1), (4, 4, 1)
    ]  # fmt: skip
    every = [meshes.plans_of([problem], solve, tries, gpu)[0] for problem in problems]
    assert plans[0].seconds == min(plan.seconds for plan in every) and len(plans) == meshes.BEST
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    for plan in plans:
        assert any(line.endswith(f"  {plan.flags()}") for line in lines)
        assert main(["train", *flags.split(), *shlex.split(plan.flags())]) == 0
    small = replace(problems[0], memory=min(p.result.peak for p in every))
    fits = best([replace(p, memory=small.memory) for p in problems], solve, tries, gpu)
    assert fits and all(p.result.peak <= small.memory for p in fits)


def test_the_least_memory_of_a_mesh_is_a_bound():
    units = {ep: predicted_units(TINY, SETTINGS, GPU, ep) for ep in (1, 4)}
    for gpus in (Gpus(4, 4, 2), Gpus(4, 1, 2), Gpus(2, 1, 4)):
        problem = Problem(TINY, SETTINGS, units[gpus.ep], gpus, 8, 0.0)
        found = search(problem, candidates(gpus.pp, [1]), tries=5)
        state = min(max(usage.state for usage in result.usage) for result in found)
        assert 0.5 * state < meshes.least_bytes(problem) - RESERVE <= state
