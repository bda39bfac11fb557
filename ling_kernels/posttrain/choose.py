"""python -m ling_kernels.posttrain.choose: the checkpoint to start reinforcement learning from, by pass@k (ApexEval).

Each checkpoint answers the same problems of a toy task `samples` times through the engine, at temperature 1, and the
one with the highest mean pass@k is chosen: what a model can find at all counts, not what it finds first.
"""

import sys
from collections.abc import Sequence

from ..commands import Parser, command
from ..errors import InputError
from ..files import user_path
from ..train.checkpoint import list_checkpoints
from .evaluate import solved
from .rewards import apex_eval
from .tasks import TASKS


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m ling_kernels.posttrain.choose", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("checkpoints", nargs="+", help="a run, for its checkpoints; or folders of models")
    parser.add_argument("--task", choices=TASKS, default="sorting", help="the toy task (default: sorting)")
    parser.add_argument("--k", type=int, default=4, metavar="N", help="of pass@k (default: 4)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers to a problem (default: 8)")
    parser.add_argument("--problems", type=int, default=64, metavar="N", help="each is asked (default: 64)")
    args = parser.parse_args(argv)
    if not 1 <= args.k <= args.samples:
        raise InputError(f"--k {args.k}: it must be at least 1, and at most --samples {args.samples}")
    folders = [user_path(c) for c in args.checkpoints]
    if len(folders) == 1 and (folders[0] / "checkpoints").is_dir():
        folders = list_checkpoints(folders[0])
        if not folders:
            raise InputError(f"{args.checkpoints[0]} holds no checkpoints")
    found = {folder: solved(folder, args.task, args.problems, args.samples) for folder in folders}
    best, means = apex_eval(found, args.k)
    for folder, mean in means.items():
        print(f"pass@{args.k} {mean:.4f}  {folder}")
    print(f"start with {best}")


if __name__ == "__main__":
    sys.exit(main())
