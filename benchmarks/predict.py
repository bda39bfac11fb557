"""python -m benchmarks.predict: what every op must take at least on H20, H100 and H200, by their data sheets, at its
own shape; GRID also as Ling-mini's first product, at the points of the grid. No GPU is needed and nothing is timed;
benchmarks/results/predictions.json."""

import json
from pathlib import Path

from benchmarks.grid import POINTS, shapes, title
from benchmarks.limits import bound, floor
from benchmarks.work import fake_work
from ling_kernels.gpu import HOPPER
from tests.cases import CASES

GRID = "grouped_gemm_fp8"  # what a layer spends most of its time in
OUT = Path(__file__).parent / "results/predictions.json"


def predictions(full: bool = False) -> list[dict]:
    rows = []
    for case in CASES:
        for shape in shapes(case, full or case.op.__name__ == GRID):
            first = dict(N=2 * POINTS[0].F, K=POINTS[0].H)
            if not full and shape is not case.shapes[-1] and not first.items() <= shape.items():
                continue
            for which, work in fake_work(case, shape).items():
                rows.append(dict(
                    case=title(case, shape), op=case.op.__name__, which=which, bytes=work.bytes, flops=work.flops,
                    precision=work.precision, **({} if shape is case.shapes[-1] else dict(grid=True, shape=shape)),
                    floor_us={name: round(floor(work, gpu) * 1e6, 2) for name, gpu in HOPPER.items()},
                    bound={name: bound(work, gpu) for name, gpu in HOPPER.items()},
                ))  # fmt: skip
    return rows


def main() -> None:
    rows = predictions()
    OUT.write_text(json.dumps(dict(kind="prediction", rows=rows), indent=1) + "\n")
    print(f"{len(rows)} rows in {OUT}")


if __name__ == "__main__":
    main()
