"""gloo with one worker a group, for torch's own, which has two, breaks the heap of a process now and then.

A worker of torch's ProcessGroupGloo that ends a collective writes its name into a std::string that it shares with the
other worker, and takes no lock (pgStatus_->lastCompletedWorkName in runLoop; torch 2.13). Where both end at once, and a
name is too long to lie in the string itself ("ALLGATHER_COALESCED"), one writes what the other has freed, and the
process dies later of "malloc(): unaligned tcache chunk detected". It took about 100,000 collectives in flight together
to be met; one worker has nobody to race with.
"""

import os
from typing import Any

import torch.distributed as dist

BACKEND = "gloo_one_worker"


def register() -> str:
    """Returns the name of the backend for CPU tensors, which torch.distributed knows from now on."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
    return BACKEND


def _create(group: Any, _: Any) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._threads = 1
    options._timeout = group.timeout
    options._devices = _devices()
    options.global_ranks_in_group = group.global_ranks_in_group
    options.group_name = group.group_id
    return dist.ProcessGroupGloo(group.store, group.group_rank, group.group_size, options)


def _devices() -> list[Any]:
    # As torch reads it for gloo: interfaces by comma, else the one that has the host's name.
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    create = dist.ProcessGroupGloo.create_device
    named = [create(interface=name) for name in interfaces.split(",") if name]
    return named or [dist.ProcessGroupGloo.create_default_device()]
