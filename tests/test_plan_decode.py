"""python -m ling_kernels.plan decode: bytes and tokens/s of a decode step."""

import json
import re
from pathlib import Path

import pytest

from ling_kernels.gpu import HOPPER
from ling_kernels.model import LingConfig
from ling_kernels.plan.decode import main, step_bytes, tokens_per_second
from ling_kernels.plan.decode_time import CLOCKS, kernels, step_time


@pytest.mark.parametrize("weights, head, GB", [("bf16", "bf16", 2.242), ("fp8", "bf16", 1.463), ("fp8", "fp8", 1.141)])
def test_bytes_of_a_step(weights, head, GB):
    """Ling-mini against separately computed sums, which have fp32 routers and no norms and scales."""
    parts = step_bytes(LingConfig.mini(), weights=weights, head=head)
    assert (sum(parts.values()) + parts["routers"]) / 1e9 == pytest.approx(GB, rel=1e-3)
    assert tokens_per_second(parts, 1, 4.8e12) == pytest.approx(4.8e12 / sum(parts.values()))


def test_bytes_of_larger_steps():
    c = LingConfig.mini()
    one, many = step_bytes(c), step_bytes(c, batch=10**6, context=10)
    assert one["experts"] == pytest.approx(19 * 8 * 3 * 2048 * 512 * 2)
    assert many["experts"] == pytest.approx(19 * 256 * 3 * 2048 * 512 * 2), "all experts"
    assert many["KV cache"] == 10**6 * 10 * 20 * 2 * 4 * 128 * 2
    weights = sum(v for k, v in many.items() if k not in ("KV cache", "embedding")) / 2
    assert weights == c.num_parameters() - c.vocab_size * c.hidden_size


@pytest.mark.parametrize("precisions", [("bf16", "bf16", "bf16"), ("fp8", "bf16", "bf16"), ("fp8", "fp8", "fp8")])
def test_time_of_a_step(precisions):
    """Five kernels a layer and three around them read all bytes; none is faster than memory or than its own clocks."""
    c, gpu = LingConfig.mini(), HOPPER["H200"]
    parts = step_bytes(c, 1, 4096, *precisions)
    counted = kernels(c, parts, *precisions)
    layers, dense = c.num_hidden_layers, c.first_k_dense_replace
    assert sum(n for n, _, _ in counted) == 5 * (layers - dense) + 9 * dense + 3
    read = sum(n * size for n, size, _ in counted)
    assert read == pytest.approx(sum(parts.values()) - parts["norms"] - parts["embedding"])
    seconds = step_time(c, parts, gpu, *precisions)
    assert seconds > max(read / gpu.bandwidth, sum(n * clocks for n, _, clocks in counted) / gpu.clock)
    assert step_time(c, parts, gpu._replace(bandwidth=1.0), *precisions) == pytest.approx(read / 0.85, rel=1e-3)


def test_clocks_are_those_of_the_table():
    """Constants of the prediction against the walk of the committed table."""
    rows = json.loads((Path(__file__).parents[1] / "benchmarks/results/clocks_cuda.json").read_text())["rows"]
    walked = {row["kernel"]: row["clocks"] for row in rows if row["part"] == "whole"}
    walked |= {row["kernel"]: row["clocks"] for row in rows if row["part"] == "after the kernel ahead"}
    if missing := CLOCKS.keys() - walked.keys():
        pytest.skip(f"the table is older than {', '.join(missing)}: make tables")
    assert {name: walked[name] for name in CLOCKS} == pytest.approx(CLOCKS, rel=0.1)


def test_plan(capsys):
    assert main(["--model", "mini", "--batch", "1", "64", "--weights", "fp8", "--context", "0"]) == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    lines = {name: values for name, *values in lines}
    assert float(lines["H200, 4.8 TB/s"][0]) == pytest.approx(3281, rel=0.02)
    assert float(lines["all"][1]) == pytest.approx(14280, rel=0.01)
    assert lines["weights"] == ["16.9", "16.9"] and lines["KV cache"] == ["0.0", "0.0"]
    assert main(["--model", "1t", "--batch", "1", "64", "--weights", "fp8", "--context", "32768"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"H200, 4.8 TB/s +needs 8 GPUs +needs 13 GPUs$", output, re.M), output
    assert main(["--model", "flash", "--batch", "1", "--weights", "fp8", "--context", "4096"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"H100, 3.35 TB/s +needs 2 GPUs$", output, re.M) and re.search(
        r"H200, 4.8 TB/s +744$", output, re.M
    )
    assert main(["--model", "1t", "--batch", "64", "--weights", "fp8", "--context", "4096", "--tp", "8"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"KV cache +10737.4$", output, re.M) and re.search(r"weights +125.6$", output, re.M), output
    assert re.search(r"H100, 3.35 TB/s +does not fit$", output, re.M) and "Prediction" not in output
    for args, output in (
        (["--tp", "0"], "--tp is 0"),
        (["--tp", "8"], "num_key_value_heads is 4"),
        (["--batch", "0"], "--batch"),
        (["--context", "-1"], "--context"),
        (["--cache", "int4"], "int4"),
    ):
        assert main(["--model", "mini", *args]) == 2
        assert output in capsys.readouterr().err
