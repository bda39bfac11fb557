"""What a call takes besides its time: memory at most, and in which kernels, or on a CPU in which of torch's ops, its
time goes."""

from collections import defaultdict
from collections.abc import Callable

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


def breakdown(call: Callable, most: int = 12) -> dict[str, float]:
    """Microseconds by kernel of the GPU, or by op of torch on a CPU: the largest; the rest together."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        torch.cuda.synchronize() if on_gpu else None
    spent = defaultdict(float)
    for event in profile.key_averages():
        spent[event.key[:60]] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    ordered = sorted(spent.items(), key=lambda pair: -pair[1])
    return dict(ordered[:most]) | {"others": sum(us for _, us in ordered[most:])}


def launches(call: Callable) -> int:
    """Kernels that a call starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.self_device_time_total)
