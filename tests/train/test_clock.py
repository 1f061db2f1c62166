import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.train import clock
from tests.helpers.hand_clock import Hands, set_by_hand

STAGES = ("double_blocks.0", "head backward")
both_devices = pytest.mark.parametrize("device", ["cpu", "cuda"])


def live(watch, part):
    if isinstance(part, float):
        Hands.now += part
        return
    with watch.phase(part[0]):
        for inner in part[1]:
            live(watch, inner)


def own(part, around=clock.REST):
    """Yields (phase, seconds) of each leaf."""
    if isinstance(part, float):
        yield around, part
        return
    name = part[0] if part[0] in clock.PHASES else around
    for inner in part[1]:
        yield from own(inner, name)


# Seconds, or a phase: its name, and what passes in it.
names = st.sampled_from((*clock.PHASES, *STAGES))
parts = st.recursive(
    st.integers(0, 9).map(float), lambda inner: st.tuples(names, st.lists(inner, max_size=4)), max_leaves=12
)


@both_devices
@settings(max_examples=60, deadline=None)
@given(laps=st.lists(st.lists(parts, max_size=4), min_size=1, max_size=3))
def test_a_phase_has_the_time_that_passed_in_it_and_in_none_inside_of_it(device, laps):
    with set_by_hand():
        watch, found = clock.Clock(torch.device(device)), []
        for lap in laps:
            for part in lap:
                live(watch, part)
            found.append(watch.lap())
        for lap, taken in zip(laps, found, strict=True):
            expected = dict.fromkeys((*clock.PHASES, clock.REST), 0.0)
            for name, passed in itertools.chain.from_iterable(map(own, lap)):
                expected[name] += passed
            assert clock.spent(taken) == pytest.approx(expected)


@both_devices
def test_what_passes_before_a_start_is_in_no_lap(device):
    with set_by_hand():
        watch = clock.Clock(torch.device(device))
        live(watch, ("compute", [5.0]))
        watch.start()
        live(watch, ("compute", [2.0]))
        assert clock.spent(watch.lap()) == pytest.approx({**dict.fromkeys(clock.PHASES, 0), "other": 0, "compute": 2})


def test_on_a_gpu_it_is_reading_that_waits():
    with set_by_hand():
        watch = clock.Clock(torch.device("cuda"))
        live(watch, ("compute", [("gather", [1.0])]))
        lap = watch.lap()
        assert not any(moment.reached for _, moment in lap)
        clock.spent(lap)
        assert lap[-1][1].reached


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_phases_add_up_to_its_own_time():
    device = torch.device("cuda")
    watch, x = clock.Clock(device), torch.randn(2048, 2048, device=device)
    for name in ("encode", "compute", "optimizer"):
        with watch.phase(name):
            x = x @ x / 2048
    lap = watch.lap()
    found = clock.spent(lap)
    assert min(found[name] for name in ("encode", "compute", "optimizer")) > 0
    assert sum(found.values()) == pytest.approx(lap[0][1].elapsed_time(lap[-1][1]) / 1e3, rel=1e-3)
