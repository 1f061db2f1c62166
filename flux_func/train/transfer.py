"""Copies between the host and the device that neither of them waits for."""

import functools

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on the device; from the host it goes there beside what is computed, and only its use waits."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device, non_blocking=x.device.type == "cpu")
    beside, here = _beside(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        out = x.pin_memory().to(device, non_blocking=True)
    here.wait_stream(beside)
    out.record_stream(here)
    return out


def to_host(x: Tensor) -> Tensor:
    """Returns a tensor on the host (from a GPU in pinned memory), whose values are there once the device has come by.

    Where the tensor is on the host already it is the same one.
    """
    return x.to("cpu", non_blocking=True)


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream that copies go by, beside the one that computes."""
    return torch.cuda.Stream(device)
