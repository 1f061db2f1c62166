import json

import pytest

from flux_func.plan import devices, report
from flux_func.plan.predict import Plan
from flux_func.plan.trace import Trace

GIB = 2**30
SIZES = {"replicate": 2, "shard": 8, "context": 1}
PLAN = Plan(
    state={"params": 10 * GIB, "opt": 20 * GIB},
    frozen={"T5": 3 * GIB},
    memory={"activations": 5 * GIB, "gradients": 2 * GIB},
    sent={("all_gather", "shard"): 4e9, ("all_reduce", "replicate"): 1e9},
    operations=6e12,
    compute=1.5,
    exposed=0.5,
    communication=0.75,
)
CASE = report.Case(devices.Cluster(devices.DEVICES["h100"], SIZES), PLAN, 64, 16 * 989e12)


def test_what_a_plan_adds_up_to():
    assert PLAN.working == 7 * GIB and PLAN.peak == 40 * GIB and PLAN.seconds == 2
    assert CASE.fits and CASE.processes == 16 and CASE.mfu == pytest.approx(0.5)


def test_details():
    said = report.details(CASE)
    assert "parameters                10.00" in said and "in all                    40.00" in said
    assert "all_gather                   shard                 4.000             0.000" in said
    assert "all_reduce                   replicate             0.000             1.000" in said
    assert "a step takes 2.000 s: 1.500 s of computing (6.0 TFLOP) and 0.500 s of waiting" in said
    assert "32.0 samples/s, MFU 50.0%" in said


def test_comparison_names_the_meshes_left_out():
    said = report.comparison([CASE] * 15, [(SIZES, "parallel.context is 3: no")])
    assert said.count("replicate=2,shard=8,context=1") == report.MOST + 1
    assert (
        "and 3 more" in said and "1 meshes cannot be, such as replicate=2,shard=8,context=1: parallel.context" in said
    )


def test_a_trace_beside():
    said = report.against((PLAN, Trace(30 * GIB, 8 * GIB, {("all_gather", "shard"): 4e9})))
    assert [line.split()[-2:] for line in said.splitlines()[2:]] == [
        ["30.00", "30.00"],
        ["7.00", "8.00"],
        ["4.000"] * 2,
    ]


def test_json():
    saved = json.loads(json.dumps(report.to_json(CASE)))
    assert saved["bytes"]["in_all"] == 40 * GIB and saved["seconds"]["step"] == 2 and saved["fits"]
    assert saved["sent"][1] == {
        "collective": "all_reduce",
        "over": "replicate",
        "bytes": 1e9,
        "between_nodes": 1e9,
    }
