from flux_func.launch import gloo
from tests.helpers import rank_gloo, ranks


def test_registering_again_changes_nothing():
    assert gloo.register() == gloo.register() == gloo.BACKEND


def test_every_group_has_one_worker():
    # torch's own gloo has two, which corrupt the heap between them.
    for workers, options in ranks.run(2, rank_gloo.workers):
        assert workers == {"before": 1, "after a group more": 2}
        assert options == (1, [0, 1], 1800.0)


def test_interfaces_are_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    assert ["lo" in repr(device) or "127.0.0.1" in repr(device) for device in gloo._devices()] == [True, True]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert len(gloo._devices()) == 1
