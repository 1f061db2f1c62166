"""Every script of the gallery is short, draws, and has its picture on the page."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
# What makes each small enough for a test.
SMALL = {
    "attention": {"lengths": (8, 16)},
    "attribution": {},
    "curvature": {"samples": 4, "steps": 3},
    "editing": {"steps": 6},
    "likelihood": {"samples": 4, "steps": 2},
    "lora": {"steps": 2, "batch": 4},
    "losses": {"steps": 2, "batch": 4},
    "meanflow": {"steps": 3, "batch": 4},
    "per_sample": {"samples": 40, "draws": 1},
    "remat": {"samples": 2, "side": 1},
    "weights": {"points": 2, "samples": 4},
}


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(GALLERY))
    import gallery

    yield gallery.untrained()
    sys.path.remove(str(GALLERY))


def test_all_scripts_are_here():
    assert {path.stem for path in GALLERY.glob("*.py")} == {*SMALL, "build", "gallery"}


@pytest.mark.parametrize("name", SMALL)
def test_a_script_draws(name, digits):
    figure = __import__(name).picture(digits, **SMALL[name])
    assert figure.axes and all(axis.has_data() for axis in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize("name", SMALL)
def test_a_script_is_short_and_has_its_picture(name):
    assert len((GALLERY / f"{name}.py").read_text().splitlines()) <= 40
    assert (GALLERY / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"({name}.png)" in (GALLERY / "README.md").read_text()
