"""The processor, where what is best depends on whose it is."""

import functools
from pathlib import Path

import torch


@functools.cache
def prefers_onednn(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Returns whether oneDNN multiplies float32 faster here than MKL, torch's choice: on AMD's processors.

    By a sixth to a quarter at FLUX's widths, on two cores of an EPYC with AVX-512. MKL is Intel's, and fast on those.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in cpuinfo.read_text()
    except OSError:
        return False
