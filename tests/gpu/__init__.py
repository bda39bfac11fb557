"""A virtual Hopper GPU: it runs the PTX of every kernel on the CPU, and finds races and wrong accesses in it.

See docs/verification.md. LING_GPU_SEED: 0 runs blocks and warps in order, any other number in a random one.
LING_GPU_SMS: multiprocessors of the GPU that csrc/ sees. LING_GPU_RACES: 0 leaves the search for races out.
LING_GPU_EAGER: where it is set, launches are not captured in a CUDA graph: they share counters and overlap less.
"""

import os
from contextlib import contextmanager


@contextmanager
def schedule(seed: int):
    """While open, blocks, warps and asynchronous copies run in another order."""
    before, os.environ["LING_GPU_SEED"] = os.environ.get("LING_GPU_SEED", "0"), str(seed)
    try:
        yield
    finally:
        os.environ["LING_GPU_SEED"] = before
