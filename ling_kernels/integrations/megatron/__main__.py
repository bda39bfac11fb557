"""python -m ling_kernels.integrations.megatron [flags] SCRIPT ...: run a script of Megatron-LM with our parts.

torchrun has -m too: torchrun --nproc-per-node 8 -m ling_kernels.integrations.megatron pretrain_gpt.py ...
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ...commands import Parser, command
from ...errors import InputError


@command
def prepare(argv: Sequence[str] | None = None) -> None:
    """Apply our parts, and give the script its arguments."""
    parser = Parser("python -m ling_kernels.integrations.megatron", description="Run a script with our parts.")
    parser.add_argument("--parts", help="of experts,attention,router,permutation,loss,balance; all by default")
    parser.add_argument("--fp8", action="store_true", help="products of experts and linear layers in FP8")
    parser.add_argument("script", help="such as pretrain_gpt.py, and its flags after it")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if not Path(args.script).is_file():
        raise InputError(f"no script {args.script}")
    from . import PARTS, apply

    apply(PARTS if args.parts is None else args.parts.split(","), args.fp8)
    sys.argv = [args.script, *args.flags]
    sys.path[0] = str(Path(args.script).resolve().parent)  # as `python SCRIPT` has it


def main(argv: Sequence[str] | None = None) -> int:
    code = prepare(argv)
    if not code:  # outside `prepare`: the script's errors and warnings are its own
        runpy.run_path(sys.argv[0], run_name="__main__")
    return code


if __name__ == "__main__":
    sys.exit(main())
