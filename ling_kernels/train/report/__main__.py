"""python -m ling_kernels.train.report RUN: write a run's report.html again."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ...commands import Parser, command
from ...errors import InputError
from .page import write_html


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m ling_kernels.train.report", description="Write a run's report.html again.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    run = parser.parse_args(argv).run
    if not run.is_dir():
        raise InputError(f"{run} is no folder")
    print(write_html(run.resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
