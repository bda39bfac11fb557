"""`plan units`: times of this machine, and the plan that takes them; the stand-in for an exchange; wrong files."""

import copy
import json

import pytest
import torch

from ling_kernels.nn import MLP, Experts, MoE, Router
from ling_kernels.plan.__main__ import main
from ling_kernels.plan.measured import PARTS, SameDevice

FLAGS = "--model tiny --mtp 1 --micro-batch 2 --seq-len 16 --device cpu".split()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("units") / "units.json"
    assert main(["units", *FLAGS, "--out", str(file)]) == 0
    return file


def plan(file, capsys, *more):
    code = main(["pipeline", *FLAGS, "--batch", "8", "--pp", "2", "--profile-units", str(file), *more])
    return code, *capsys.readouterr()


def test_the_plan_takes_measured_times(measured, tmp_path, capsys):
    content = json.loads(measured.read_text())
    assert list(content["units"]) == [*"EdtmL"] and content["device"] == "CPU"
    assert all(content["units"][kind][part] > 0 for kind in "dtm" for part in PARTS)
    for kind in content["units"]:
        content["units"][kind] = dict.fromkeys(PARTS, 0)
    content["units"]["t"] = dict(forward=1, input_gradient=2, weight_gradient=3)
    (changed := tmp_path / "changed.json").write_text(json.dumps(content))
    code, out, _ = plan(changed, capsys, "--pipeline", "Ett|ttmL", "--schedule", "1F1B")  # d, one t; two t
    assert code == 0 and "Units measured on CPU, float32; the rest predicted." in out and "MFU" not in out
    (step,) = (line.split()[1] for line in out.splitlines() if line.startswith("step"))
    assert float(step) == pytest.approx(1 + 4 * (2 + 10) + 5)  # rank 1 has four micro batches, without a pause
    assert "t, MoE          1000.00  2000.00  3000.00" in out


def test_rows_of_the_experts_of_other_gpus():
    """A GPU with half of the experts gets all rows: as if the other half had the same weights."""
    torch.manual_seed(0)
    ep, H, F = 2, 16, 8
    here = MoE(Router(H, 8, 2, 1, 2, 2.5), Experts(8 // ep, H, F), MLP(H, F))
    for p in here.parameters():
        torch.nn.init.normal_(p)
    whole = copy.deepcopy(here)
    whole.experts = Experts(8, H, F)
    with torch.no_grad():
        for mine, every in zip(here.experts.parameters(), whole.experts.parameters(), strict=True):
            every.copy_(mine.repeat(ep, 1, 1))
    here.exchange = SameDevice(here, ep)
    x = torch.randn(11, H)
    torch.testing.assert_close(here(x)[0], whole(x)[0])


def test_units_of_a_part_of_the_experts(tmp_path, capsys):
    file = tmp_path / "ep.json"
    assert main(["units", *FLAGS, "--ep", "2", "--recompute", "full", "--out", str(file)]) == 0
    capsys.readouterr()
    code, out, _ = plan(file, capsys, "--ep", "2", "--recompute", "full", "--tries", "2", "--vpp", "1")
    assert code == 0 and "measured on CPU" in out


@pytest.mark.parametrize("change, flags, message", [
    (dict(of=None), "", "it is no file of `plan units`"),
    ({}, "--seq-len 32", "it is of seq_len 16, and this plan of 32"),
    ({}, "--ep 2", "it is of ep 1, and this plan of 2"), (dict(units={}), "", "it has no times of E, L, d, m, t"),
    (dict(units=dict.fromkeys("EdtmL", 3)), "", "are no seconds"),
    (dict(units=dict.fromkeys("EdtmL", dict.fromkeys(PARTS, float("nan")))), "", "are no seconds"),
])  # fmt: skip
def test_a_wrong_file_is_one_line(change, flags, message, measured, tmp_path, capsys):
    content = json.loads(measured.read_text()) | change
    (file := tmp_path / "wrong.json").write_text(json.dumps(content))
    code, _, error = plan(file, capsys, *flags.split())
    assert code == 2 and message in error and f"--profile-units {file}" in error and error.count("\n") == 1


def test_paths_that_cannot_be_used(tmp_path, capsys):
    code, _, error = plan(tmp_path / "none.json", capsys)
    assert code == 2 and "cannot read" in error and error.count("\n") == 1
    for flags, message in (
        ([], "it is a folder"),
        (["--out", "x", "--ep", "3"], "--ep 3 does not divide the 16 experts"),
    ):
        assert main(["units", *FLAGS, "--out", str(tmp_path), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
