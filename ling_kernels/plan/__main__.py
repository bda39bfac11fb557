"""python -m ling_kernels.plan train|pipeline|units|decode|ladder|interval: memory and time of a training run, the
layout of a pipeline, the times of its units, bytes and tokens/s of a decode step, the loss of a model from a ladder of
smaller ones that it trains, or the time between two checkpoints."""

import sys
from collections.abc import Sequence

from ..commands import Parser, command
from . import decode, interval, ladder, measured, pipeline, train

COMMANDS = {
    "train": train.main, "pipeline": pipeline.main, "units": measured.main, "decode": decode.main,
    "ladder": ladder.main, "interval": interval.main,
}  # fmt: skip


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m ling_kernels.plan", description=__doc__.partition(": ")[2])
    parser.add_argument("what", choices=COMMANDS, help="each has its own --help")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv[:1])
    return COMMANDS[args.what](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
