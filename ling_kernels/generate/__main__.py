"""python -m ling_kernels.generate: the command of cli.py."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
