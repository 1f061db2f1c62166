"""Cases of a bench so small that a step takes milliseconds, asked as bench_main asks, and rows made by hand."""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_func.bench import cases, ours, serve
from flux_func.bench.cases import Case, Settings, Side
from flux_func.bench.measure import Row
from flux_func.bench.serve import Work

SMALL = dict(flavor="flux-tiny", depth=(1, 1), image_size=32, tokens=5, batch=2)


def case(work: str = "train_step", **fields: Any) -> Case:
    """Returns a case of a model with one block of each kind."""
    return Case(work=work, **{**SMALL, **fields})


def ask(asked: Case, sides: Sequence[Side], folder: Path, **settings: Any) -> list[Path]:
    """Returns the requests to the sides, their weights written too."""
    weights = cases.write_weights(asked.cfg, [side.peer for side in sides], 0, folder)
    return cases.ask(asked, sides, Settings(**settings), weights, folder)


def work(path: Path, peer: str = "ours") -> Work:
    """Returns what a side does, which is asked by a file, in this process."""
    request = json.loads(path.read_text())
    given = serve.load(request["weights"], "cpu"), serve.load(request["inputs"], "cpu")
    if peer == "ours":
        return ours.work(request, *given)
    if str(serve.REFERENCES) not in sys.path:
        sys.path.append(str(serve.REFERENCES))
    reference, question = importlib.import_module(f"with_{peer}"), importlib.import_module("answer").question
    return serve.theirs(reference, question, request, *given)


def row(seconds: Sequence[float], peer: str = "ours", asked: Case | None = None, **fields: Any) -> Row:
    """Returns a row that took so long: 8 GiB, of them 2 of imports and 3 that are kept."""
    memory = dict(peak_bytes=8 << 30, imported_bytes=2 << 30, kept_bytes=3 << 30)
    usual = dict(losses=(1.5, 1.25), flops=2 * 10**12, about={"threads": 2}, **memory)
    side = fields.pop("side", Side(peer))
    return Row(asked or case(), side, tuple(seconds), **{**usual, **fields})
