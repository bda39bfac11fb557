"""How the C library keeps the memory of a process that computes on a CPU."""

import ctypes
import sys

import torch


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors: glibc would map each large tensor anew, and
    the kernel clear its pages again. That is a third of the time of an MoE layer with its backward on a CPU, where the
    gradient of all experts is one tensor; the process takes a fifth more memory then (32 experts of mini, x86_64, glibc
    2.36, 2026-11-30). For commands: a process that imports this package decides for itself.

    Nothing happens beside a GPU, where the host's memory is for checkpoints, or under another C library.
    """
    if torch.cuda.is_available() or sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
