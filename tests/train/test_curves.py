import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux_func.train import curves

BLUE, ORANGE = (0x1B, 0x5E, 0x9E), (0xD9, 0x66, 0x1F)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3) | st.sampled_from([math.nan, math.inf]), max_size=30),
    span=st.floats(1, 50),
)
def test_smooth_is_the_weighted_mean(values, span):
    decay = 1 - 2 / (span + 1)
    for i, mean in enumerate(curves.smooth(values, span)):
        weighted = [(decay ** (i - j), x) for j, x in enumerate(values[: i + 1]) if math.isfinite(x)]
        if sum(w for w, _ in weighted) < 1e-300:
            assert math.isnan(mean) or not weighted or math.isfinite(mean)
        else:
            expected = math.fsum(w * x for w, x in weighted) / math.fsum(w for w, _ in weighted)
            assert mean == pytest.approx(expected, abs=1e-9)


def test_smooth_keeps_constants_and_follows_with_span_one():
    assert curves.smooth([2.5] * 9, 7) == pytest.approx([2.5] * 9)
    assert curves.smooth([3.0, 1.0, 2.0], 1) == [3.0, 1.0, 2.0]
    assert curves.smooth([], 5) == []


def test_series_takes_the_records_that_have_the_field():
    records = [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 3.0}, {"step": 2, "loss": None}]
    steps, values = curves.series(records, "loss")
    assert steps == [1, 2] and values[0] == 2.0 and math.isnan(values[1])
    assert curves.series(records, "lr") == ([], [])


def test_pairs_name_the_items():
    assert curves.pairs([0.5, None]) == [("0", 0.5), ("1", None)]
    assert curves.pairs({"t": 1}) == [("t", 1)]


def records(n, validations=0):
    rng = random.Random(0)
    every = n // validations if validations else n + 1
    for step in range(1, n + 1):
        loss = 0.5 + math.exp(-5 * step / n) + rng.gauss(0, 0.05)
        speed = {"lr": 1e-4 * min(1, 4 * step / n), "images_per_s": rng.gauss(3, 0.1)}
        yield {"step": step, "loss": loss, "grad_norm": math.exp(rng.gauss(0, 1)), **speed}
        if step % every == 0:
            by_timestep = [None, *[loss * i / 4 for i in range(1, 8)]]
            yield {"step": step, "validation_loss": loss, "validation_loss_by_timestep": by_timestep}


def pixels(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 600
        return np.asarray(image.convert("RGB")).astype(int)


def count(image, color):
    return int((np.abs(image - color).sum(axis=-1) < 20).sum())


@pytest.mark.parametrize(
    "case",
    [
        [],
        [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.0, "images_per_s": 0.3}],
        [{"step": 3, "validation_loss": 1.0, "validation_loss_by_timestep": {"0": 1.0}}],
        list(records(1)),
        [{**record, "time_share": {"compute": 0.9, "gather": 0.0, "other": 0.1}} for record in records(1)],
        list(records(10)),
        list(records(10, 2)),
        list(records(10_000, 20)),
    ],
    ids=[
        "none",
        "not finite",
        "validation alone",
        "one",
        "one with shares",
        "ten",
        "ten with validation",
        "ten thousand",
    ],
)
def test_draw_curves_draws_any_run(tmp_path, case):
    path = tmp_path / "curves.png"
    curves.draw_curves(case, path)
    image = pixels(path)
    assert list(tmp_path.iterdir()) == [path]
    assert (count(image, BLUE) > 2000) == (len(case) >= 10)
    assert (count(image, ORANGE) > 30) == any("validation_loss" in record for record in case)


def test_draw_curves_replaces_the_picture(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    curves.draw_curves(list(records(10)), path)
    assert count(pixels(path), BLUE) > 2000


def test_areas_are_the_shares(tmp_path):
    """Of two phases, one has three quarters of the time: so many of the panel's pixels are in its colour."""
    curve, share = tmp_path / "curves.png", {"optimizer": 0.25, "gather": 0.0, "compute": 0.75}
    curves.draw_curves([{**record, "time_share": share} for record in records(30)], curve)
    image = pixels(curve)
    painted = [count(image, [int(color[i : i + 2], 16) for i in (1, 3, 5)]) for color in curves._AREAS]
    # The first colour is that of records too; the last one that of the frames.
    assert painted[0] / painted[1] == pytest.approx(3, rel=0.15) and painted[2:6] == [0] * 4
