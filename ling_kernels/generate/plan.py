"""The old name of `python -m ling_kernels.plan decode`, for one version."""

import sys

from ..plan.decode import gpus, held_bytes, main, step_bytes, tokens_per_second

__all__ = ["gpus", "held_bytes", "main", "step_bytes", "tokens_per_second"]

if __name__ == "__main__":
    sys.exit(main())
