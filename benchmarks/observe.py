"""What a call takes besides its time: memory at most, and in which kernels, or on a CPU in which of torch's ops, its
time goes."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


class peak_memory:
    """with peak_memory() as peak: ...; then peak.bytes, of the GPU or of the process; None where nobody counts."""

    def __enter__(self):
        self.bytes, self.counts = None, True
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return self
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the kernel's high-water mark is what is resident now
        except OSError:
            self.counts = False
        return self

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated()
        elif self.counts:
            with open("/proc/self/status") as lines:
                self.bytes = next((1024 * int(s.split()[1]) for s in lines if s.startswith("VmHWM")), None)


@dataclass
class Profile:
    """Of one call: microseconds by kernel of the GPU, or by op of torch on a CPU; on a GPU also how many kernels ran,
    and how many calls of the host started them."""

    spent: dict[str, float]
    kernels: int
    calls: int

    def largest(self, most: int = 12) -> dict[str, float]:
        """The rest together."""
        ordered = sorted(((name[:60], us) for name, us in self.spent.items()), key=lambda pair: -pair[1])
        return dict(ordered[:most]) | {"others": sum(us for _, us in ordered[most:])}

    def parts(self, kinds: Sequence[tuple[str, str]]) -> dict[str, float]:
        """By the first of (part, what its names look like) that fits; the largest first, what fits none last."""
        found = defaultdict(float)
        for name, us in self.spent.items():
            found[next((part for part, like in kinds if re.search(like, name, re.I)), "others")] += us
        return dict(sorted(found.items(), key=lambda pair: (pair[0] == "others", -pair[1])))


def profile(call: Callable) -> Profile:
    on_gpu, activity = torch.cuda.is_available(), torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as told:
        call()
        torch.cuda.synchronize() if on_gpu else None
    events = told.key_averages()
    if not on_gpu:
        return Profile({e.key: e.self_cpu_time_total for e in events}, 0, 0)
    ran = [e for e in events if e.self_device_time_total]
    starts = sum(e.count for e in events if re.match("cu(da)?(Graph)?Launch", e.key))
    return Profile({e.key: e.self_device_time_total for e in ran}, sum(e.count for e in ran), starts)


def breakdown(call: Callable) -> dict[str, float]:
    return profile(call).largest()
