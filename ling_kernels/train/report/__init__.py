"""What a run shows: its files of figures, lines and a progress bar, TensorBoard and wandb, plots, report.html.

`python -m ling_kernels.train.report RUN` writes report.html again.
"""

from .lines import Lines, open_lines, read_lines
from .report import FP8_FILE, SAMPLES, Details, NoReport, Report, duration

__all__ = ["FP8_FILE", "SAMPLES", "Details", "Lines", "NoReport", "Report", "duration", "open_lines", "read_lines"]
