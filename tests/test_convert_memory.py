"""The memory that a conversion takes does not grow with the file. docs/convert_memory.py measures it at full size."""

import dataclasses
import importlib.util
import pathlib
import re

import pytest

import flux_func as ff
from flux_func import convert_main
from flux_func.interop import weights
from tests.helpers import tiny_run

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def resident(field):
    """Returns VmRSS (bytes resident) or VmHWM (the most there were) of this process."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def noise():
    spec = importlib.util.spec_from_file_location("convert_memory", tiny_run.ROOT / "docs/convert_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Noise


def write(path, cfg):
    dtype = ff.tree.flatten(ff.abstract(cfg))["img_in.weight"].dtype
    types = {name: dtype for name in ff.tree.flatten(ff.abstract(cfg))}
    weights.write(noise()(cfg, types), path, "bfl")
    return path


def most_taken(source, to, format):
    """Returns the most bytes that a conversion in this process took at a time."""
    try:
        CLEAR.write_text("5")  # forget the most there were
    except OSError:
        pytest.skip("this system does not let a process measure itself")
    before = resident("VmRSS")
    assert tiny_run.program(convert_main, f"--from={source}", f"--to={to}", f"--format={format}") == 0
    return resident("VmHWM") - before


@pytest.mark.parametrize("chain", [("diffusers", "torchtitan", "bfl"), ("orbax", "bfl")], ids="-".join)
def test_memory_does_not_grow_with_the_file(tmp_path, chain):
    small = dataclasses.replace(ff.flavor("flux-tiny"), depth=1, depth_single_blocks=1)
    large = dataclasses.replace(ff.flavor("flux-digits"), hidden_size=768, num_heads=16, depth=2, depth_single_blocks=4)
    taken = {}
    for name, cfg in (("small", small), ("large", large)):  # the small one imports what is needed
        source = write(tmp_path / f"{name}.safetensors", cfg)
        size = source.stat().st_size
        for format in chain:
            to = tmp_path / (f"{name}-{format}" + ".safetensors" * (format == "bfl"))
            taken[format] = most_taken(source, to, format)
            source = to
    assert size > 250e6
    assert max(taken.values()) < 0.4 * size, taken
