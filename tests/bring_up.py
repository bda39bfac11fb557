"""The first minutes of csrc/ on a GPU: one process for each check, in the order in which kernels build on one another.

    python -m tests.bring_up           all checks, four at once; a check that hangs is stopped after 25 seconds
    python -m tests.bring_up wgrad     one check, in this process

A process of its own, because after an illegal access no later CUDA call of a process works, and because a barrier that
is never completed looks like a hang and not like an error. A check prints the shape before it runs it.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

import tests.conftest  # noqa: F401  without a GPU: csrc/ on the CPU
from benchmarks.work import title
from ling_kernels.backend import force
from ling_kernels.op import E4M3
from ling_kernels.ops import gemm_fp8, quantize, quantize_weight
from tests.cases import CASES, DEVICE, Case
from tests.test_ops import test_matches_reference as matches_reference

SECONDS = 25 if DEVICE == "cuda" else 500  # of one check; importing torch and starting CUDA takes about eight of them


def cases(*ops: str, where: Callable[[Case], bool] = lambda case: True) -> Callable[[], None]:
    """A check of ops with kernels in csrc/: every test shape of their Cases, the first dtype."""

    def check():
        found = [c for c in CASES if c.op.__name__ in ops and "cuda" in c.backends and where(c)]
        for case in found:
            for shape in case.shapes[:-1]:
                print(title(case, shape), flush=True)
                matches_reference(case, shape, case.dtypes[0], "cuda")
                synchronize()

    return check


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def weights_written_just_before() -> None:
    """A product reads weights that the kernel before it on the stream writes: always the new ones.

    `gemm_fp8` of few rows loads weights early, and so must not begin before the kernel ahead has ended: outside of CUDA
    graphs csrc/ does not let it.
    """
    x, one = torch.randn(1, 2048, device=DEVICE), torch.randn(512, 2048, device=DEVICE)
    x_q, x_scale = quantize(x)
    (first, scale), (second, _) = quantize_weight(one), quantize_weight(one.flip(0))
    w = first.clone()
    want = [gemm_fp8(x_q, x_scale, t, scale) for t in (first, second)]
    for i in range(400 if DEVICE == "cuda" else 4):
        w.view(torch.uint8).copy_((first, second)[i % 2].view(torch.uint8))
        got = gemm_fp8(x_q, x_scale, w, scale)
        assert torch.equal(got, want[i % 2]), f"product {i} used the weights from before they were written"
    assert w.dtype == E4M3 and not torch.equal(*want)


def is_transposed(case: Case) -> bool:
    return "transposed" in case.kwargs


def gathers(case: Case) -> bool:
    return "T" in case.shapes[-1]  # the shape counts tokens that the kernel gathers, not rows


CHECKS: dict[str, Callable[[], None]] = {
    "quantize": cases("quantize", "quantize_weight", "transpose_fp8"),
    "rows": cases("rms_norm", "swiglu", "swiglu_backward"),
    "gemm": cases("gemm_fp8", where=lambda case: not is_transposed(case)),
    "grouped gemm": cases("grouped_gemm_fp8", where=lambda case: not is_transposed(case) and not gathers(case)),
    "gather": cases("grouped_gemm_fp8", where=gathers),
    "transposed": cases("gemm_fp8", "grouped_gemm_fp8", where=is_transposed),
    "wgrad": cases("grouped_wgrad"),
    "routing": cases("route", "dispatch", "permute", "permute_quantize", "unpermute", "balance_bias_"),
    "attention": cases("attention", "qk_norm_attention", "qk_norm_rope"),
    "attention decode": cases("attention_decode", "qk_norm_attention_decode"),
    "moe decode": cases("moe_decode", "rms_norm_router", "rms_norm_linear"),
    "layers": cases("moe", "expert_mlp", "grouped_gemm_fp8_masked"),
    "fresh weights": weights_written_just_before,
}


def commands(names=CHECKS) -> dict[str, list[str]]:
    return {name: [sys.executable, "-m", "tests.bring_up", name] for name in names}


def run(command: list[str], seconds: float = SECONDS) -> tuple[str, str, float]:
    """(ok, failed or hangs; the last line that the command printed; seconds)."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            out = process.communicate(timeout=seconds)[0]
            status = "failed" if process.returncode else "ok"
        except subprocess.TimeoutExpired:
            process.kill()
            out, status = process.communicate()[0], "hangs"
    return status, (out.strip().splitlines() or [""])[-1], time.monotonic() - began


def run_all(todo: dict[str, list[str]], seconds: float = SECONDS) -> Iterator[tuple[str, str, str, float]]:
    """(name, *run(command)) of each, in order, as it ends."""
    with ThreadPoolExecutor(4) as pool:
        for name, result in zip(todo, pool.map(lambda command: run(command, seconds), todo.values()), strict=True):
            yield name, *result


def main() -> int:
    if len(sys.argv) > 1:
        name = " ".join(sys.argv[1:])
        if name not in CHECKS:
            print(f"error: no check {name!r}; known are {', '.join(CHECKS)}", file=sys.stderr)
            return 2
        with force("cuda"):
            CHECKS[name]()
        return 0
    bad = []
    for name, status, detail, seconds in run_all(commands()):
        print(f"{name:<18}{status:<8}{seconds:>5.1f} s  {'' if status == 'ok' else detail[:110]}", flush=True)
        bad += [name] * (status != "ok")
    print(f"not ok: {', '.join(bad)}" if bad else f"all {len(CHECKS)} checks ok")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
