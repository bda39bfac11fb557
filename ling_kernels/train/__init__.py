"""Training on one device: the class `Trainer`, and the command `python -m ling_kernels.train`, which uses it."""

import os

# Waiting OpenMP threads spin. Where other programs want the cores too, endless spinning made a step up to 30 times
# slower (7 s against 0.4 s, two threads on two busy cores); sleeping at once made it twice as slow on idle cores. So
# they spin briefly, then sleep. GNU's OpenMP reads these variables when torch is loaded, hence before the imports.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from ..errors import Diverged  # noqa: E402
from .settings import Settings  # noqa: E402
from .trainer import Trainer  # noqa: E402

__all__ = ["Diverged", "Settings", "Trainer"]
