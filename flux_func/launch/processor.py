"""The processor, where what is best depends on whose it is."""

import functools
from pathlib import Path

import torch


@functools.cache
def prefers_onednn(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Returns whether oneDNN multiplies float32 faster here than MKL, torch's choice: on AMD's processors.

    What that is worth is in docs/benchmarks.md. MKL is Intel's, and fast on Intel's.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in cpuinfo.read_text()
    except OSError:
        return False
