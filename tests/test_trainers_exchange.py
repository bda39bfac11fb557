"""The trainer's --exchange over DeepEP and symmetric memory, by their stand-ins, against the exchange by all-to-all."""

# ruff: noqa: F811 (fixtures are imported)
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ling_kernels.model import Ling, save_model
from ling_kernels.plan.__main__ import main as plan
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train.prepare import run as preparation
from tests.cluster import command, run_jobs
from tests.test_deep_ep import ElasticBuffer
from tests.test_symmetric import SHARED, nvshmem
from tests.training import text, tiniest, whole_tensors  # noqa: F401

MICRO, LENGTH, CP = 2, 48, 2
CONFIG = replace(tiniest(), num_nextn_predict_layers=1, num_attention_heads=4, num_key_value_heads=2)
TOKENS = MICRO * LENGTH // CP
MISSING = {
    "deepep": "the package deep_ep (github.com/deepseek-ai/DeepEP) cannot be imported",
    "symmetric": "an exchange over symmetric memory needs CUDA and NVSHMEM",
}


def by_deep_ep(argv):
    sizes = []

    class Buffer(ElasticBuffer):
        model = CONFIG.hidden_size, CONFIG.num_experts_per_tok

        def sent(self, x, *rest):
            sizes.append((self.tokens, len(x)))
            return super().sent(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "check_exchange", lambda exchange, device: None)
        patch.setitem(sys.modules, "deep_ep", SimpleNamespace(topk_idx_t=torch.int64, ElasticBuffer=Buffer))
        return command(argv), sizes


def by_symmetric_memory(argv):
    with nvshmem(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "check_exchange", lambda exchange, device: None)
        return command(argv), [t.shape[0] for t in SHARED.values() if t is not None and t.is_floating_point()]


def without_gpus(argv):
    """Where DeepEP and NVSHMEM are installed, but the run is on the CPU."""
    with nvshmem(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", SimpleNamespace())
        return command(argv)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("exchanges")
    model = Ling(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder / "model", dtype=torch.float32)
    flags = f"--model {folder / 'model'} --data {text} --seq-len {LENGTH} --batch 8 --micro-batch {MICRO} --threads 1"
    rest = f"--steps 2 --eval-rows 4 --sample-tokens 90 --lr 3e-3 --precision bf16 --cp {CP} --ep 2"

    def job(name: str, more: str):
        return name, [[*flags.split(), *rest.split(), *more.split(), "--out", str(folder / name)]] * 2

    # A sample is no longer than a row, which the buffers take: 90 tokens do not fit. So has "bf16" less of them.
    jobs = [job("bf16", "--sample-tokens 4")]
    jobs += [job(name, f"--exchange {name}") for name in MISSING]
    jobs += [job(f"no {name}", f"--exchange {name}") for name in MISSING]
    jobs += [job(f"{name} without GPUs", f"--exchange {name} --device cpu") for name in MISSING]
    others = dict(deepep=by_deep_ep, symmetric=by_symmetric_memory)
    run_jobs(jobs, folder, 2, others | {f"{name} without GPUs": without_gpus for name in MISSING})
    return folder


def result(runs, name):
    return [json.loads((runs / f"{name}.{rank}").read_text()) for rank in range(2)]


def trained(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    weights = whole_tensors(ckpt.list_checkpoints(runs / name)[-1], "model")
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines], weights


def test_deep_ep(runs):
    """A rank's rows come once and their results are summed in bf16. Buffers take a micro batch's tokens on a rank."""
    for (code, _, error), sizes in result(runs, "deepep"):
        assert code == 0, error
        assert {most for most, _ in sizes} == {TOKENS} and max(n for _, n in sizes) == TOKENS
    assert result(runs, "bf16")[0][0] == 0
    for one, two in zip(*(trained(runs, name)[0] for name in ("deepep", "bf16")), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)


def test_symmetric_memory(runs):
    """The bits of the exchange by all-to-all, over buffers of the worst load."""
    for (code, _, error), rows in result(runs, "symmetric"):
        assert code == 0, error
        assert {*rows} == {2 * TOKENS * min(CONFIG.num_experts_per_tok, CONFIG.num_experts // 2)}
    (one, weights), (two, others) = (trained(runs, name) for name in ("symmetric", "bf16"))
    assert one == two and weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_one_line_of_rank_0(runs, name):
    no_gpus = "is for GPUs; --exchange bf16 works on CPUs too\n"
    for job, message in ((f"no {name}", f": {MISSING[name]}"), (f"{name} without GPUs", f" {no_gpus}")):
        (code, _, error), other = result(runs, job)
        assert code == 2 and error.startswith(f"error: --exchange {name}{message}") and error.count("\n") == 1, error
        assert other == [2, "", ""] and not (runs / job).exists()


def test_plans(capsys):
    """DeepEP as the exchange by all-to-all; symmetric memory by its rows, those of the worst load."""

    def peaks(exchange: str) -> tuple[str, str]:
        flags = f"train --model tiny --dp 2 --ep 2 --batch 8 --micro-batch 2 --exchange {exchange}"
        assert plan(flags.split()) == 0
        rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line)
        return rows["peak"].split("  ")[0], rows["worst"].split("  ")[0]

    plain = peaks("bf16")
    assert plain[0] != plain[1]
    assert peaks("deepep") == plain and peaks("symmetric") == (plain[1], plain[1])
