"""The training command on two and four processes against one: losses, updates, checkpoints, resuming, refusals, a rank
that stops."""

# ruff: noqa: F811 (fixtures are imported)
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.model import Ling, save_model
from ling_kernels.parallel.exchange import expert_parameters
from ling_kernels.parallel.ranks import rank_of_torchrun
from ling_kernels.parallel.schedules import schedule_order, write_csv
from ling_kernels.train import Trainer, monitor, trainer
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train.__main__ import main
from ling_kernels.train.corpus import open_corpus
from ling_kernels.train.prepare import run as preparation
from tests.cluster import command, free_ports, run_jobs
from tests.training import text, tiniest, whole_tensors  # noqa: F401

MOST = 4  # processes; most runs have two
SPEED = {"tokens_per_s", "mfu"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with an MTP layer. The second half of the experts, which another rank holds, has gradients many times
    larger, so that a norm that misses or repeats a rank's experts clips otherwise."""
    model = Ling(replace(tiniest(), num_nextn_predict_layers=1, num_attention_heads=4, num_key_value_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in expert_parameters(model):
            p[len(p) // 2 :] *= 8
    save_model(model, folder := tmp_path_factory.mktemp("small"), dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def plain(small, text):
    """Flags of a run with clipping, MTP, balancing, checkpoints and validations, in two micro batches."""
    data = f"--model {small} --data {text} --seq-len 48 --batch 8 --micro-batch 4 --eval-rows 12 --threads 1"
    rest = "--lr 3e-3 --warmup 4 --clip 0.5 --balance-rate 0.01 --sample-tokens 4 --log-every 1"
    return [*data.split(), *rest.split(), *"--steps 4 --save-every 2 --eval-every 2 --keep 0".split()]


JOBS = {
    "dp": ("", ""),
    "dp in two copies": ("--dp-replicate 2", ""),
    "ep": ("--ep 2", ""),
    "copies, with ep and vocabulary": ("--dp 4 --dp-replicate 2 --ep 2 --vocab-parallel 2 --micro-batch 2", ""),
    "copies, with pp": ("--pp 2 --dp-replicate 2 --pipeline Et|t|m|LL --micro-batch 2", ""),
    "copies, with cp and ep": ("--dp-replicate 2 --cp 2 --ep 2", ""),
    "8 bits in two copies": (
        "--optimizer adamw8bit --precision bf16 --master bf16 --steps 2 --dp-replicate 2",
        "--optimizer adamw8bit --precision bf16 --master bf16 --steps 2",
    ),
    "ep in two groups": ("--dp 4 --ep 2 --micro-batch 2", ""),
    "pp": ("--pp 2 --micro-batch 2", ""),
    "pp of uneven stages, with ep": ("--pp 2 --ep 2 --pipeline Et|t|m|LL --micro-batch 2", ""),
    "cp and vocabulary": ("--cp 2 --vocab-parallel 2", ""),
    "tp, with cp, experts and vocabulary": ("--tp 2 --cp 2 --ep 4 --vocab-parallel 2", ""),
    "tp, with pp of deferred weight gradients": (
        "--tp 2 --pp 2 --pipeline Et|t|m|LL --schedule InterleavedZeroBubble --micro-batch 2 --recompute-mtp",
        "",
    ),
    "by nodes, with cp and vocabulary": (
        "--dp 2 --cp 2 --ep 4 --exchange-by-nodes --vocab-parallel 2",
        "",
    ),
    "pp in the order of a file, with cp and vocabulary": (
        "--pp 2 --cp 2 --vocab-parallel 2 --pipeline E|t|t|mLL --schedule ORDER --micro-batch 2",
        "",
    ),
    "zero bubble in a V, with a ramp": (
        "--pp 2 --pipeline Et||t|mL --schedule ZBVZeroBubble --batch-ramp 4:3 --micro-batch 1",
        "--batch-ramp 4:3 --micro-batch 2",
    ),
    "8 bits": ("--optimizer adamw8bit --precision bf16 --master bf16 --steps 2",) * 2,
    "muon, random weights": ("--optimizer muon --steps 2 --model CONFIG",) * 2,
    "8 bits of whole matrices, with tp": ("--optimizer adamw8bit --steps 2 --tp 2", "--optimizer adamw8bit --steps 2"),
    "muon, with tp, dp and ep": ("--optimizer muon --steps 2 --tp 2 --dp 2 --ep 2", "--optimizer muon --steps 2"),
    "experts of 8 bits": (
        "--optimizer adamw8bit --ep 2 --steps 2 --model CONFIG",
        "--optimizer adamw8bit --steps 2 --model CONFIG",
    ),
}
FP8 = "--model FP8 --precision fp8 --fp8-scales pow2 --fp8-watch 1 --fp8-fallback 1 --micro-batch 2 --steps 2"
REFUSED = {  # flags of rank 0, of rank 1, the line
    "world": ("--dp 3", "--dp 3", "--dp 3 times --pp 1 are 3 processes, and there are 2: start them with torchrun"),
    "settings": ("", "--lr 1e-3", "rank 1 has the setting lr 0.001, rank 0 0.003"),
    "one rank's": ("", "--seq-len 1", "rank 1: --seq-len 1: it must be at least 2"),
    "resume": ("", "--resume auto", "rank 1 has --resume auto, rank 0 None"),
    "folders": ("", "", "rank 1 has --out /"),
    "ep beyond the processes": ("--ep 3",) * 2 + ("--ep 3 does not divide the 2 processes of --dp",),
    "layout": ("--pp 2 --pipeline Et|x",) * 2 + ("--pipeline Et|x: 'x' is none of",),
    "another model's layout": ("--pp 2 --pipeline Ett|tmL",) * 2 + ("--pipeline Ett|tmL: 3 t, but",),
    "schedule": ("--pp 2 --schedule GPipes",) * 2 + ("--schedule GPipes: it must be one of",),
    "micro batch": ("--micro-batch 8",) * 2 + ("--batch 8 is not a multiple of --dp 2 times --micro-batch 8",),
    "micro batches of a pipeline": ("--pp 2 --micro-batch 8",) * 2 + ("--batch 8 gives each pipeline 1 micro batch",),
    "version": ("", "", "rank 1 has version of ling kernels 0.0, rank 0 "),  # see rank_1_differs
    "order of the data": ("", "", "rank 1 has the data {'tokens': "),
    "GPU": ("", "", "rank 1: --device cuda: torch finds no GPU here"),
}


def rank_1_differs(name: str, argv: list[str]) -> tuple[int, str, str]:
    """`command`, where rank 1 has another version, no GPU, or a disk of its own with the documents in another order."""

    def other_order(s, tokenizer, vocab_size, cache, *rest):
        file = cache.with_name("reversed.jsonl")
        file.write_text("\n".join(reversed(Path(s.data[0]).read_text().splitlines())))
        return open_corpus(replace(s, data=(str(file),)), tokenizer, vocab_size, cache.with_name("reversed"), *rest)

    def no_gpu(settings):
        raise InputError("--device cuda: torch finds no GPU here")

    with pytest.MonkeyPatch.context() as patch:
        if rank_of_torchrun() == 1 and name == "version":
            patch.setattr(preparation, "__version__", "0.0")
        if rank_of_torchrun() == 1 and name == "order of the data":
            patch.setattr(trainer, "open_corpus", other_order)
        if rank_of_torchrun() == 1 and name == "GPU":
            patch.setattr(preparation, "choose_device", no_gpu)
        return command(argv)


def no_band(argv: list[str]) -> tuple[int, str, str]:
    """`command`, where every FP8 layer is outside its band, so that all switch to bf16 after a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "BANDS", dict.fromkeys(monitor.OPERANDS, (0.0, 0.0)))
        return command(argv)


def products_in_fp32(argv: list[str]) -> tuple[int, str, str]:
    """`command`, where Muon's products are in fp32. In bf16, gradients that differ by fp32 rounding may be rounded to
    neighbours, 2^-8 apart, and each of its 5 iterations makes small singular values 3.4 times larger. Seen once: after
    two steps, which moved weights by 4e-4 (rms), they differed by up to 8e-5 with bf16, and 6e-8 with fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", lambda t: t.to(torch.float32, copy=True))
        return command(argv)


def stop_answering(results: Path, argv: list[str]) -> tuple[int, str]:
    """Rank 1 waits in its second step until rank 0 has reported. Exit code and stderr of rank 0, which leaves without
    Python's clean-up."""
    rank, step, reported = rank_of_torchrun(), Trainer.step, results / "reported"

    def slow(trainer):
        if rank == 1 and trainer.progress.step == 1:
            while not reported.exists():
                time.sleep(0.1)
            os._exit(0)
        return step(trainer)

    def leave(code):
        reported.touch()
        raise SystemExit(code)

    Trainer.step, stderr = slow, io.StringIO()
    if rank == 0:
        os._exit = leave
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as left:
        main(argv)
    return left.value.code, stderr.getvalue()


DIFFERING = {name: functools.partial(rank_1_differs, name) for name in ("version", "order of the data", "GPU")}
OTHERS = DIFFERING | {"fp8": no_band, "muon, with tp, dp and ep": products_in_fp32}  # jobs that are not `command` alone
DIVISIONS = ("--dp-replicate", "--pp", "--cp", "--tp", "--ep")


def processes_of(name: str) -> int:
    flags = JOBS[name][0]
    return 4 if "--dp 4" in flags or sum(flag in flags for flag in DIVISIONS) > 1 else 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory, plain, small):
    """The folder of all runs, with the results of the jobs of two processes."""
    folder = tmp_path_factory.mktemp("cluster")

    def run(flags: str, name: str) -> list[str]:
        files = dict(CONFIG=small / "config.json", FP8=folder / "fp8.json", ORDER=folder / "order.csv")
        given = [str(files.get(word, word)) for word in flags.split()]
        return [*plain, *given, "--out", str(folder / name)]

    sizes = dict(hidden_size=128, intermediate_size=128, moe_intermediate_size=128, head_dim=64)
    replace(tiniest(), num_nextn_predict_layers=1, **sizes).to_json(folder / "fp8.json")
    write_csv(schedule_order("InterleavedZeroBubble", 2, 4, 4), folder / "order.csv")

    for name, (_, flags) in JOBS.items():
        if flags or name == "dp":
            assert OTHERS.get(name, command)(run(flags, f"{name} alone"))[0] == 0
    assert no_band(run(FP8, "fp8 alone"))[0] == 0
    half = folder / "resumed by four"
    shutil.copytree(folder / "dp alone", half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    same = lambda argv, ranks=2: [argv] * ranks  # noqa: E731
    jobs = [(name, same(run(flags, name), processes_of(name))) for name, (flags, _) in JOBS.items()]
    jobs.append(("fp8", same(run(f"{FP8} --pp 2 --ep 2 --exchange fp8", "fp8"), MOST)))
    resume = "--ep 2 --tp 2 --vocab-parallel 2 --pp 2 --micro-batch 2"
    copies = folder / "resumed in copies"
    shutil.copytree(half, copies)
    jobs.append(
        ("copies", same(["--resume", str(copies), *"--dp 2 --dp-replicate 2 --pp 2 --micro-batch 2".split()], MOST))
    )
    jobs.append(("resumed", same(["--resume", str(half), *resume.split()], MOST)))
    for name, (first, second, _) in REFUSED.items():
        other = "refused, too" if name == "folders" else "refused"
        jobs.append((name, [run(first, "refused"), run(second, other)]))
    jobs.append(("silent", same(run("--dist-timeout 3", "silent"))))
    run_jobs(jobs, folder, MOST, OTHERS | dict(silent=functools.partial(stop_answering, folder)))
    return folder


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def agree(a: Path, b: Path, rtol: float, atol: float) -> None:
    """Assert that metrics, and the last checkpoints, are equal: to the bit where the bounds are 0. atol: of weights and
    the optimizer's state."""
    one, two = ([{k: v for k, v in r.items() if k not in SPEED} for r in metrics_of(run)] for run in (a, b))
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for x, y in zip(one, two, strict=True):
        assert x == pytest.approx(y, rel=rtol, abs=0)
    last = [ckpt.list_checkpoints(run)[-1] for run in (a, b)]
    assert last[0].name == last[1].name
    for stem in ("model", "optimizer"):
        x, y = (whole_tensors(c, stem) for c in last)
        assert x.keys() == y.keys()
        for name in x:
            if x[name].dtype == torch.uint8 and rtol:  # codes of moments: neighbours
                assert (x[name].int() - y[name].int()).abs().max() <= 1, name
            else:
                torch.testing.assert_close(x[name], y[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", JOBS)
def test_several_processes_equal_one(runs, name):
    """Data parallel: the bits of one process that has a micro batch for each rank. Experts sum the rows of all ranks in
    one product, so that their gradients differ by rounding; so do a pipeline's, whose norm has other sums."""
    results = [json.loads((runs / f"{name}.{rank}").read_text()) for rank in range(processes_of(name))]
    assert not any(code for code, _, _ in results), results
    assert f"processes  {len(results)}:" in results[0][1] and not any(out for _, out, _ in results[1:])
    alone = runs / f"{name if JOBS[name][1] or name == 'dp' else 'dp'} alone"
    assert all(m["grad_norm"] > 0.5 for m in metrics_of(alone))  # clipped
    exact = not {"--ep", "--pp", "--cp", "--tp"} & {*JOBS[name][0].split()}
    # Rounding may give a moment a neighbouring code, 1 % of a step away.
    bound = 5e-5 if "adamw8bit" in JOBS[name][0] else 2e-6
    agree(runs / name, alone, *((0, 0) if exact else (1e-4, bound)))
    samples = [(run / "samples.jsonl").read_text() for run in (runs / name, alone)]
    assert samples[0] == samples[1] and '"text"' in samples[0]


def test_rows_in_fp8_and_its_errors_in_every_stage(runs):
    """Experts get the numbers that one process gives them; their weights' gradients are of rounded rows. FP8's errors
    are measured in each stage's first micro batch, of experts those of the first rank; layers of all stages switch."""
    assert json.loads((runs / "fp8.0").read_text())[0] == 0
    for one, two in zip(*(metrics_of(runs / name) for name in ("fp8", "fp8 alone")), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)
    one, two = (json.loads((runs / name / "fp8.jsonl").read_text().splitlines()[0]) for name in ("fp8", "fp8 alone"))
    assert one["layers"].keys() == two["layers"].keys() and len(one["layers"]) > 8
    states = [ckpt.read_state(ckpt.list_checkpoints(runs / name)[-1]) for name in ("fp8", "fp8 alone")]
    assert sorted(states[0]["in_bf16"]) == sorted(states[1]["in_bf16"]) and len(states[0]["in_bf16"]) > 8
    for layer, operands in two["layers"].items():
        for operand, values in operands.items():
            if ".experts" not in layer:
                assert one["layers"][layer][operand] == pytest.approx(values, rel=0.1, abs=1e-4), (layer, operand)


def test_resumed_by_four_and_by_one(runs):
    """A run of one process goes on with four, one of two with one: the same rows, the same weights."""
    for name, folder in (("resumed", "resumed by four"), ("copies", "resumed in copies")):
        assert json.loads((runs / f"{name}.0").read_text())[0] == 0
        agree(runs / folder, runs / "dp alone", 1e-4, 2e-6)
    others = (
        "pp of uneven stages, with ep",
        "pp in the order of a file, with cp and vocabulary",
        "tp, with pp of deferred weight gradients",
    )
    for name, bounds in (("dp", (0, 0)), ("dp in two copies", (0, 0)), *((other, (1e-4, 2e-6)) for other in others)):
        half = runs / f"{name} resumed by one"
        shutil.copytree(runs / name, half)
        shutil.rmtree(half / "checkpoints" / "step-000004")
        one = "--dp 1 --dp-replicate 1 --ep 1 --pp 1 --cp 1 --tp 1 --vocab-parallel 1 --micro-batch 4"
        assert command(["--resume", str(half), *one.split()])[0] == 0
        agree(half, runs / "dp alone", *bounds)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_of_rank_0(runs, name):
    (code, _, error), other = (json.loads((runs / f"{name}.{rank}").read_text()) for rank in range(2))
    assert code == 2 and error.startswith(f"error: {REFUSED[name][2]}") and error.count("\n") == 1, error
    assert other == [2, "", ""]
    assert not (runs / "refused").exists() and not (runs / "refused, too").exists()


def test_a_rank_that_stops_is_reported(runs):
    code, error = json.loads((runs / "silent.0").read_text())
    assert code == 1 and error.splitlines()[-1].startswith("error: rank 0 of 2 waited in vain for another: "), error


def torchrun(folder: Path, leaves: str, where: str) -> list[str]:
    """torchrun, with a script that runs the trainer, in which one process calls `leaves` before its fourth step, once
    there is a checkpoint, if `where` holds."""
    (folder / "leaving.py").write_text(
        "import os, signal, sys, time\n"
        "from ling_kernels.train import Trainer\n"
        "from ling_kernels.train.__main__ import main\n"
        "step = Trainer.step\n"
        "def leaving(trainer):\n"
        f"    if trainer.progress.step == 3 and {where}:\n"
        "        while not (trainer.folder / 'checkpoints' / 'step-000002').exists(): time.sleep(0.01)\n"
        f"        {leaves}\n"
        "    return step(trainer)\n"
        "Trainer.step = leaving\n"
        "sys.exit(main())\n"
    )
    return [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--rdzv-backend", "c10d"]


ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))


def test_restart_after_a_killed_rank(runs, plain, tmp_path):
    """torchrun starts both again, and --resume auto goes on from the last checkpoint, to the same bits."""
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and trainer.ranks.rank == 1"
    argv = torchrun(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", first)
    run = tmp_path / "run"
    argv += ["--rdzv-endpoint", "127.0.0.1:0", "--nproc-per-node", "2", str(tmp_path / "leaving.py")]
    done = subprocess.run(
        [*argv, *plain, "--out", str(run), "--resume", "auto"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "steps 1 to 4" in done.stdout and "steps 3 to 4" in done.stdout
    agree(run, runs / "dp alone", 0, 0)


def test_a_machine_that_leaves(runs, plain, tmp_path):
    """torchrun --nnodes 1:2: one of two machines goes, and the other goes on alone with the same flags, to the same
    bits."""
    both = "os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)"
    argv = torchrun(tmp_path, both, "os.environ['MACHINE'] == '1'")
    run, (port,) = tmp_path / "run", free_ports(1)
    found = [*argv, "--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    flags = [str(word) for word in (tmp_path / "leaving.py", *plain, "--out", run, "--resume", "auto")]
    machines = [
        subprocess.Popen(
            [*found, "--rdzv-conf", f"is_host={int(i == 0)},last_call_timeout=5,keep_alive_interval=1", *flags],
            env=ENVIRONMENT | dict(MACHINE=str(i), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        out, error = machines[0].communicate(timeout=200)
        assert machines[0].returncode == 0, error
        assert machines[1].wait(10) < 0 and "processes  2:" in out + machines[1].communicate()[0]
    finally:
        for machine in machines:
            machine.kill()
    assert "steps 3 to 4" in out and "processes" not in out.partition("steps 3 to 4")[2]
    agree(run, runs / "dp alone", 0, 0)
