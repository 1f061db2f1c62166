import pytest
import torch.distributed as dist

from flux_func.plan import trace
from flux_func.plan.meter import Meter

SIZES = {"replicate": 2, "shard": 4, "context": 3}


def test_processes_that_are_not_there():
    with trace.processes(SIZES) as mesh:
        assert dist.get_world_size() == mesh.size() == 24 and mesh.rank == 0
        assert dist.get_process_group_ranks(mesh.group(("shard", "context"))) == list(range(12))
        assert dist.get_process_group_ranks(mesh.group(("replicate",))) == [0, 12]
    assert not dist.is_initialized()


def test_they_are_gone_after_an_error():
    with pytest.raises(KeyError), trace.processes(SIZES):
        raise KeyError
    assert not dist.is_initialized()


def test_groups_are_named_as_planned():
    with trace.processes({**SIZES, "replicate": 1}) as mesh:
        named = trace.group_names(mesh)
        assert sorted(named.values()) == ["context", "shard", "shard x context"]
        assert named[mesh.group().group_name] == "shard x context"
    assert Meter().live == 0
