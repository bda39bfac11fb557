"""Before a run: settings checked, model, device, precision and threads chosen, the run's folder made.

Every mistake is an InputError before any work is done.
"""

from .device import deterministic, peak_flops
from .run import Run, discard, latest_run, new_run, resumed_run

__all__ = ["Run", "deterministic", "discard", "latest_run", "new_run", "peak_flops", "resumed_run"]
