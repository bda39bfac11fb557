"""python -m ling_kernels.train"""

import os
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    # Waiting OpenMP threads spin. Where other programs want the cores too, endless spinning made a step up to 30 times
    # slower (7 s against 0.4 s, two threads on two busy cores); sleeping at once made it twice as slow on idle cores.
    # So they spin briefly, then sleep. GNU's OpenMP reads these variables when torch is loaded, hence before the
    # imports; and only here, since a process that imports this package decides for itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from ..host_memory import keep_freed_memory  # noqa: E402
from ..plan import train as planner  # noqa: E402 (above this room: only a __main__, which nothing imports, may do so)
from . import cli  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(argv, planner)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
