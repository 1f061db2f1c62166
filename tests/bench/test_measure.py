import contextlib
import math

import pytest

from flux_func.bench import measure, process
from flux_func.bench.cases import Settings, Side
from flux_func.bench.measure import Disagreement
from tests.helpers import tiny_bench

SIDES = [Side("ours"), Side("bfl"), Side("ours", remat="full")]
WEIGHTS = dict.fromkeys(("ours", "bfl"), "weights")
PYTHONS = {"ours": "here", "bfl": "there"}


@pytest.fixture
def log(monkeypatch):
    """What stand-ins for processes are told, by the number of their request; their n-th steps take n seconds."""
    found = []

    @contextlib.contextmanager
    def started(peer, python, request, cache=None):
        found.append(("starts", peer, python, request.stem, cache and cache.name))
        taken = []

        def step():
            found.append(("step", request.stem))
            taken.append(None)
            count = len(taken)
            return {"seconds": float(count), "loss": 1 / count, "peak_bytes": 10 - count, "kept_bytes": count}

        try:
            yield lambda: {"about": {"of": peer}, "imported_bytes": 1}, step
        finally:
            found.append(("ends", request.stem))

    monkeypatch.setattr(process, "started", started)
    return found


def run(work, folder, **settings):
    ticks = []
    asked, given = tiny_bench.case(work), Settings(**settings)
    rows = measure.measure(asked, SIDES, given, WEIGHTS, PYTHONS, folder, ticks.append)
    assert len(ticks) == measure.ticks(asked, SIDES, given)
    return rows


def test_all_are_there_at_once_and_step_in_turn(log, tmp_path):
    rows = run("train_step", tmp_path, warmup=1, rounds=2)
    starts = [("starts", peer, PYTHONS[peer], str(i), None) for i, peer in enumerate(("ours", "bfl", "ours"))]
    turn = [("step", str(i)) for i in range(3)]
    assert log == [*starts, *turn, *turn, *turn, *(("ends", str(i)) for i in (2, 1, 0))]
    assert [row.side for row in rows] == SIDES
    for row in rows:
        # The first step was the warm-up; its loss was compared.
        assert row.seconds == (2, 3) and row.median == 2.5 and row.losses == (1.0,)
        assert (row.peak_bytes, row.imported_bytes, row.kept_bytes, row.rest_bytes) == (8, 1, 3, 4)
        assert row.flops == tiny_bench.case().flops(4) and row.about == {"of": row.side.peer}


def test_compilation_is_of_fresh_processes_with_nothing_compiled(log, tmp_path):
    rows = run("compile", tmp_path, warmup=7, rounds=2)
    one = [[("starts", side.peer, PYTHONS[side.peer], str(i)), ("step", str(i))] for i, side in enumerate(SIDES)]
    caches = [entry[4] for entry in log if entry[0] == "starts"]
    assert len({*caches}) == 6 and None not in caches
    assert [entry[:4] for entry in log if entry[0] != "ends"] == 2 * [entry for pair in one for entry in pair]
    assert [entry[0] for entry in log] == 6 * ["starts", "step", "ends"]
    assert all(row.seconds == (1, 1) and row.losses == (1, 1) and row.flops == 0 for row in rows)


def answers(*losses):
    return [{"loss": loss} for loss in losses]


def test_losses_may_be_apart_by_rounding():
    wide, narrow = Side("bfl"), Side("bfl", "bfloat16")
    near = {Side("ours"): answers(1.0, 2.0, 5.0), wide: answers(1.00009, 2.0, 9.0), narrow: answers(1.009, 1.99)}
    found = measure.agree(tiny_bench.case(), near)
    # What later steps make of a difference is no fault of theirs.
    assert found[wide] == (1.00009, 2.0) and found[narrow] == (1.009, 1.99)


@pytest.mark.parametrize(
    ("ours", "theirs", "line"),
    [
        ((1.0, 1.0), (1.0, 1.00011), "loss of step 2 is 1 of ours and 1.00011 of bfl, 1.1e-04 apart, should be within"),
        ((1.0,), (math.nan,), "loss of step 1 is 1 of ours and nan of bfl, nan apart"),
        ((math.inf,), (math.inf,), "loss of step 1 is inf of ours and inf of ours, nan apart"),
        ((0.0,), (1.0,), "loss of step 1 is 0 of ours and 1 of bfl, 1.0e+00 apart"),
    ],
)
def test_losses_that_are_apart_are_an_error(ours, theirs, line):
    with pytest.raises(Disagreement) as error:
        measure.agree(tiny_bench.case(), {Side("ours"): answers(*ours), Side("bfl"): answers(*theirs)})
    assert str(error.value).startswith(f"{tiny_bench.case()}: {line}")


def test_a_disagreement_ends_all_before_anything_is_timed(log, tmp_path, monkeypatch):
    monkeypatch.setitem(measure.BOUNDS, "float32", -1.0)
    with pytest.raises(Disagreement):
        run("train_step", tmp_path, warmup=2, rounds=5)
    assert [entry[0] for entry in log] == 3 * ["starts"] + 6 * ["step"] + 3 * ["ends"]


def test_a_ratio_is_to_the_fastest_of_the_others_in_the_same_type():
    ours, slow, fast = (tiny_bench.row([t, 3 * t], peer) for t, peer in ((2, "ours"), (5, "bfl"), (4, "diffusers")))
    narrow = tiny_bench.row([1, 1], side=Side("bfl", "bfloat16"))
    group = [ours, slow, fast, narrow]
    assert [measure.base(row, group).side.peer for row in group] == ["diffusers", "diffusers", "diffusers", "bfl"]
    assert measure.base(narrow, group) is narrow
    assert measure.ratios(ours, tiny_bench.row([4, 3])) == [0.5, 2.0]
    # Of ours alone: to the first.
    alone = [ours, tiny_bench.row([1, 1], side=Side("ours", "bfloat16"))]
    assert measure.base(alone[1], alone) is ours


def test_rows_by_case():
    one, other = tiny_bench.case(), tiny_bench.case(batch=4)
    rows = [tiny_bench.row([1], asked=asked) for asked in (one, other, one)]
    assert measure.by_case(rows) == [[rows[0], rows[2]], [rows[1]]]
