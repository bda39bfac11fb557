"""Power laws of losses, L(C) = floor + a C^-b: least squares, and an interval for the loss of another run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

FLOORS = 200  # values of the floor that are tried
DRAWS = 400  # of the bootstrap


@dataclass(frozen=True)
class PowerLaw:
    floor: float
    a: float
    b: float

    def __call__(self, compute: float) -> float:
        return self.floor + self.a * compute**-self.b


def fit(compute: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The law with the least squares of log(L - floor), weighted so that errors of L count alike, over floors from 0 to
    just below the lowest loss. Raises InputError for fewer than three different sizes and for losses that do not fall.
    """
    x, y = np.log(np.asarray(compute, float)), np.asarray(losses, float)
    if len(np.unique(x)) < 3:
        raise InputError(f"a power law needs runs of three sizes or more; there are {len(np.unique(x))}")
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise InputError("a loss is not finite, or not above 0")
    floor, a, b, falls = fits(x, y[None])
    if not falls[0]:
        raise InputError("the losses do not fall with the compute: there is no power law")
    return PowerLaw(float(floor[0]), float(a[0]), float(b[0]))


def fits(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Floor, a, b of each row of losses [R, n] at the log compute x [n], and whether they fall."""
    floors = rows.min(1)[:, None] * np.linspace(0, 1 - 1e-3, FLOORS)
    rest = rows[:, None] - floors[..., None]  # [R, FLOORS, n]
    z, w = np.log(rest), rest * rest  # an error e of L is e / rest of its logarithm
    total = w.sum(-1)
    mx, mz = (w * x).sum(-1) / total, (w * z).sum(-1) / total
    dx, dz = x - mx[..., None], z - mz[..., None]
    slope = (w * dx * dz).sum(-1) / (w * dx * dx).sum(-1)
    error = (w * (dz - slope[..., None] * dx) ** 2).sum(-1)
    error[slope >= 0] = np.inf
    best = error.argmin(1)[:, None]
    floor, s, z0, x0, e = (np.take_along_axis(v, best, 1)[:, 0] for v in (floors, slope, mz, mx, error))
    return floor, np.exp(z0 - s * x0), -s, np.isfinite(e)


def predict(
    compute: Sequence[float], losses: Sequence[float], at: float, share: float = 0.9, seed: int = 0
) -> tuple[PowerLaw, float, tuple[float, float]]:
    """The law, its loss at `at` FLOPs, and an interval in which a run's loss there lies with probability `share`.

    The interval is a bootstrap's: laws are fitted again to the law's losses with residuals drawn with replacement,
    widened for the fitted parameters, and the run gets a residual too. It knows nothing of a law that bends.
    """
    law, rng = fit(compute, losses), np.random.default_rng(seed)
    x = np.log(np.asarray(compute, float))
    fitted = np.array([law(c) for c in compute])
    free = max(len(x) - 3, 1)
    residuals = (np.asarray(losses, float) - fitted) * np.sqrt(len(x) / free)
    floor, a, b, falls = fits(x, fitted + rng.choice(residuals, (DRAWS, len(x))))
    drawn = (floor + a * at**-b + rng.choice(residuals, DRAWS))[falls]
    low, high = np.quantile(drawn, [(1 - share) / 2, (1 + share) / 2])
    return law, law(at), (float(low), float(high))
