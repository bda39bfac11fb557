"""The exchange in two stages on 2 nodes of 2 processes each, against one process with all experts."""

import copy

import torch
from torch.distributed.device_mesh import init_device_mesh

from ling_kernels.parallel import exchange
from tests.ranks import run, summed
from tests.test_expert_parallel import E, H, T, choices, layer, results_of

WORLD, NODES = 4, 2


def test_four_processes_equal_one(tmp_path):
    run(tmp_path, [layers_agree], WORLD)


def layers_agree(rank, group):
    """fp32 within its rounding, since sums have another order; bf16 with one rounding more; FP8 rows, too."""
    mesh = init_device_mesh("cpu", (NODES, WORLD // NODES))
    for fold, fp8, dtype, tolerance in (
        (False, False, torch.float32, 1e-5), (True, False, torch.float32, 1e-5),
        (False, False, torch.bfloat16, 0.02), (True, True, torch.bfloat16, 0.02),
    ):  # fmt: skip
        for kind in ("own", "one rank", "no tokens", "some left out"):
            moe = layer(fold, fp8, dtype, **(dict(pow2=True, wgrad="bf16") if fp8 else {}))
            shared = copy.deepcopy(moe)
            exchange.shard_experts_(shared, mesh, "fp8" if fp8 else "bf16")
            assert len(shared.experts.gate_up) == E // WORLD
            torch.manual_seed(100 + rank)
            x, dy = torch.randn(2, T, H).to(dtype)
            experts = choices(kind, rank)
            results = [results_of(m, x, dy, experts) for m in (moe, shared)]
            for (i, want), got in zip(enumerate(results[0]), results[1], strict=True):
                atol = tolerance * want.abs().max().item()
                torch.testing.assert_close(
                    got, want, rtol=0, atol=atol, msg=lambda m, at=(fold, dtype, kind, i): f"{at}: {m}"
                )
            for name in ("gate_up", "down"):
                want = summed(getattr(moe.experts, name).grad, group).chunk(WORLD)[rank]
                got = getattr(shared.experts, name).grad.float()
                assert (got - want).norm() <= (0.03 if fp8 else tolerance) * want.norm() + 1e-6, (
                    fold,
                    dtype,
                    kind,
                    name,
                )
            a_token_crosses_once(shared, x, moe.router, experts)


def a_token_crosses_once(shared, x, router, experts):
    with torch.no_grad():
        weights, experts, counts, _ = router(x, None, experts)
        _, plan, _ = shared.exchange.dispatch(x, weights, experts, counts)
    nodes = [{int(e) // (E // NODES) for e in row if e >= 0} for row in experts]
    assert sum(plan.crossing[1][0]) == sum(map(len, nodes))
