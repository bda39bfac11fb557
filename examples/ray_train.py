"""The trainer under Ray Train: Ray starts the processes, on any of its cluster's machines; the rest is the trainer's.

    python examples/ray_train.py WORKERS [flags of python -m ling_kernels.train]
    python examples/ray_train.py 8 --model mini --data /shared/texts --out /shared/runs/mini --ep 8 --batch 64

Needs the package `ray[train]`. Each worker is a process with a GPU, or with a CPU core where the cluster has no GPUs;
--dp, --ep, --pp and the others divide the work among them as under torchrun. Data and the run's folder are on a file
system that all machines see. A worker that fails stops the others, and Ray starts all again, up to three times: with
--out and --resume auto, which are added, they go on from the last checkpoint.
"""

import os
import sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer

DAY = 24 * 3600  # seconds: ranks wait for rank 0 to tokenise; --dist-timeout is the limit within a step


def work(config: dict) -> None:
    """A worker: the process group is made by Ray, and the numbers are where torchrun has them."""
    from ling_kernels.train.__main__ import main

    context = get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    if code := main(config["flags"]):
        raise RuntimeError(f"the trainer ended with exit code {code}")


if __name__ == "__main__":
    workers, *flags = sys.argv[1:]
    ray.init(ignore_reinit_error=True)
    gpu = "GPU" in ray.cluster_resources()
    if "--resume" not in flags:
        flags += ["--resume", "auto"]
    trainer = TorchTrainer(
        work,
        train_loop_config={"flags": flags},
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=gpu),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=DAY),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    result = trainer.fit()
    print(f"trained by {workers} workers under Ray {ray.__version__}")
