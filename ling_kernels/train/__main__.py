"""python -m ling_kernels.train"""

import sys
from collections.abc import Sequence

from ..plan import train as planner  # above this room: only a __main__, which nothing imports, may do so
from . import cli


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(argv, planner)


if __name__ == "__main__":
    sys.exit(main())
