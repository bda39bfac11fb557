"""--profile N: a trace of N steps in RUN/profile/, for chrome://tracing or ui.perfetto.dev, and a table of the ops.

On a GPU also a snapshot of the memory that the steps allocate, for pytorch.org/memory_viz. Recording slows these steps
down, and changes none of their bits; a validation, sample or checkpoint between them is recorded too.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3  # steps before, in which kernels are compiled, caches filled and the optimizer's state allocated
TOP = 40  # ops in the table
MEMORY_EVENTS = 100_000  # kept for the snapshot


def recorded(folder: Path) -> str | None:
    """The last steps whose profile is in the folder, as its files name them."""
    return max((path.stem for path in folder.glob("steps-*.txt")), default=None)


class StepProfiler:
    """Records steps `first` to `last` of a process whose first `since` steps are done; call begin and end around
    each."""

    def __init__(self, folder: Path, since: int, number: int, steps: int, device: torch.device):
        self.folder, self.cuda = folder, device.type == "cuda"
        self.last = min(since + WARM_UP + number, steps) if number else 0
        self.first = max(min(since + WARM_UP + 1, self.last - number + 1), since + 1)  # less warm-up in a short run
        self.profile: profile | None = None

    def begin(self, step: int) -> None:
        if self.profile is None and self.first <= step <= self.last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
            self.profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self.profile.start()

    def end(self, step: int) -> list[str]:
        """After the last of the steps, or where a run stops among them, write the files -> lines for the user."""
        return self.stop(step) if step >= self.last else []

    def stop(self, step: int) -> list[str]:
        if self.profile is None:
            return []
        recorded, self.profile, self.last = self.profile, None, 0
        try:
            if self.cuda:
                torch.cuda.synchronize()
            recorded.stop()
            self.folder.mkdir(exist_ok=True)
            name = f"steps-{self.first:06}-{step:06}"
            trace, table = self.folder / f"{name}.json", self.folder / f"{name}.txt"
            recorded.export_chrome_trace(str(trace))
            by = "self_device_time_total" if self.cuda else "self_cpu_time_total"
            table.write_text(recorded.key_averages().table(sort_by=by, row_limit=TOP, max_name_column_width=70))
            written = [trace, table]
            if self.cuda:
                written.append(self.folder / f"{name}.pickle")
                torch.cuda.memory._dump_snapshot(str(written[-1]))
        except (OSError, RuntimeError) as error:  # RuntimeError: the trace's own, on a full disk
            return [f"warning: no profile: {' '.join(str(error).split())}"]
        finally:
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        return [f"step {step}: profile of steps {self.first} to {step} in {self.folder}: "
                + ", ".join(path.name for path in written)]  # fmt: skip
