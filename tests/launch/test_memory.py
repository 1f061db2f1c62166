"""A CPU's memory is kept between steps, and nothing else changes."""

import json
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json, resource, sys
import torch
from flux_func.launch import memory

memory.keep_freed(sys.argv[1])
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(16 << 20) for _ in range(2)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    del made
print(json.dumps([faults, float(torch.ones(9).sum())]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc alone")
def test_pages_are_those_of_the_step_before():
    def faults(device):
        done = subprocess.run([sys.executable, "-c", SCRIPT, device], capture_output=True, text=True, check=True)
        found, total = json.loads(done.stdout)
        assert total == 9
        return found

    first, *_, last = faults("cpu")
    assert last < first / 100
    first, *_, last = faults("cuda")
    assert last > first / 2


def test_it_may_be_asked_for_again():
    from flux_func.launch import memory

    memory.keep_freed("cuda")
    assert torch.ones(4).sum() == 4
