"""python -m benchmarks.predict: what every op must take at least on H20, H100 and H200, by their data sheets. No GPU is
needed and nothing is timed; benchmarks/results/predictions.json."""

import json
from pathlib import Path

from benchmarks.grid import shapes, title
from benchmarks.limits import NAMEPLATE, bound, floor
from benchmarks.work import fake_work
from tests.cases import CASES

OUT = Path(__file__).parent / "results/predictions.json"


def predictions(full: bool = False) -> list[dict]:
    rows = []
    for case in CASES:
        for shape in shapes(case, full):
            for which, work in fake_work(case, shape).items():
                rows.append(dict(
                    case=title(case, shape), op=case.op.__name__, which=which, bytes=work.bytes, flops=work.flops,
                    precision=work.precision,
                    floor_us={name: round(floor(work, gpu) * 1e6, 2) for name, gpu in NAMEPLATE.items()},
                    bound={name: bound(work, gpu) for name, gpu in NAMEPLATE.items()},
                ))  # fmt: skip
    return rows


def main() -> None:
    rows = predictions()
    OUT.write_text(json.dumps(dict(kind="prediction", rows=rows), indent=1) + "\n")
    print(f"{len(rows)} rows in {OUT}")


if __name__ == "__main__":
    main()
