"""python -m ling_kernels.integrations.hub FOLDER: write the repository of the Hub kernel."""

import sys
from pathlib import Path

from ...commands import Parser, command
from .write import VARIANTS, write


@command
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="ling_kernels.integrations.hub", description="Writes the repository of the Hub kernel.")
    parser.add_argument("folder", type=Path, help="its build/ and README.md are replaced")
    folder = parser.parse_args(arguments).folder
    write(folder)
    print(f"[hub] {', '.join(str(folder / 'build' / variant) for variant in VARIANTS)}")


if __name__ == "__main__":
    sys.exit(main())
