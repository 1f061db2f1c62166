"""The host's memory, where it is what a model computes in."""

import contextlib
import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed(device_type: str) -> None:
    """Has the C library keep the memory that a CPU's tensors give back, for those of the next step.

    It would return large pieces to the system, and each page of a new one costs a fault and a fill with zeros: with
    flux_debug 140,000 a step. What a process holds is the most that it ever needed, as before; a GPU's host is left to
    return what it loaded. Where the C library is not glibc, or tensors are another's (jemalloc), nothing changes.

    Args:
      device_type: "cpu" or "cuda".
    """
    if device_type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
