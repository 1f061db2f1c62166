import pytest
import torch

from flux_func.plan.devices import DEVICES, HOP_BETWEEN, HOP_INSIDE, START, Cluster

H100 = DEVICES["h100"]
SIXTEEN = Cluster(H100, {"replicate": 2, "shard": 8, "context": 1})


def test_a_kernel_takes_as_long_as_the_slower_of_arithmetic_and_memory():
    assert H100.seconds(989e12, 0, torch.bfloat16) == pytest.approx(1 / 0.8)
    assert H100.seconds(989e12, 0, torch.bfloat16, attention=True) == pytest.approx(1 / 0.35)
    assert H100.seconds(67e12, 0, torch.float32) == pytest.approx(1 / 0.8)
    assert H100.seconds(1, 3.35e12, torch.bfloat16) == pytest.approx(1)


@pytest.mark.parametrize("name", DEVICES)
def test_devices_are_in_the_units_they_say(name):
    device = DEVICES[name]
    assert device.name == name
    assert 70 * 2**30 < device.room < device.memory < 200 * 2**30
    assert device.network < device.link < device.bandwidth < device.peak[4] < device.peak[2]


def test_a_group_in_a_node_uses_its_links_alone():
    seconds = SIXTEEN.seconds("all_gather", ("shard",), 360e9)
    assert seconds == pytest.approx(1 + START + 7 * HOP_INSIDE)
    assert SIXTEEN.crossing("all_gather", ("shard",)) == 0


def test_a_ring_over_nodes_shares_its_adapters():
    # Eight of the sixteen are in each node: a ring crosses twice, and each device has an adapter.
    both = ("replicate", "shard")
    assert SIXTEEN.crossing("all_gather", both) == 1 / 8
    assert SIXTEEN.seconds("all_gather", both, 400e9) == pytest.approx(
        400 / 360 + START + 14 * HOP_INSIDE + HOP_BETWEEN
    )
    slow = Cluster(H100, SIXTEEN.sizes, node=2)
    assert slow.crossing("reduce_scatter", both) == 1 / 2
    assert slow.seconds("reduce_scatter", both, 100e9) == pytest.approx(1 + START + 8 * HOP_INSIDE + 7 * HOP_BETWEEN)


def test_one_of_each_node_has_the_network_to_itself():
    assert SIXTEEN.crossing("all_reduce", ("replicate",)) == 1
    assert SIXTEEN.seconds("all_reduce", ("replicate",), 50e9) == pytest.approx(1 + START + 2 * HOP_BETWEEN)


def test_exchanges_go_to_each_of_the_others():
    both = ("replicate", "shard")
    assert SIXTEEN.crossing("all_to_all", both) == pytest.approx(8 / 15)
    assert SIXTEEN.seconds("permute", both, 50e9) == pytest.approx(1 + START + HOP_BETWEEN)
    assert SIXTEEN.seconds("permute", ("shard",), 360e9) == pytest.approx(1 + START + HOP_INSIDE)
