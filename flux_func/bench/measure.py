"""Sides in one run: checked to compute the same, then stepped in turn, A B A B, so that all have the same weather."""

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_func.bench import cases, process
from flux_func.bench.cases import Case, Settings, Side

# How far losses may be apart, relatively, before any time is believed.
BOUNDS = {"float32": 1e-4, "bfloat16": 1e-2}
# Steps whose losses are compared: the second one sees what the first did to the weights.
COMPARED = 2
# What a side answered to its steps.
Answers = list[dict[str, Any]]
Tick = Callable[[str], object]


class Disagreement(Exception):
    """Sides do not compute the same."""


@dataclass(frozen=True)
class Row:
    """What was found of a side in one case.

    Attributes:
      case, side: which.
      seconds: of each round.
      losses: of the steps that were compared; of a sample the mean square of its latents.
      flops: floating-point operations of a round, by formula; 0 where more than those is measured.
      peak_bytes: the most memory in a round: resident, or allocated on the GPU.
      imported_bytes: of those what was there before weights were: the interpreter and its imports.
      kept_bytes: of those weights and moments.
      about: its versions, threads and device.
    """

    case: Case
    side: Side
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    flops: int
    peak_bytes: int
    imported_bytes: int
    kept_bytes: int
    about: Mapping[str, Any]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def rest_bytes(self) -> int:
        """What a step takes beside imports, weights and moments: gradients, activations, scratch."""
        return self.peak_bytes - self.imported_bytes - self.kept_bytes


def measure(
    case: Case,
    sides: Sequence[Side],
    settings: Settings,
    weights: dict[str, Path],
    pythons: Mapping[str, str],
    folder: Path,
    tick: Tick = lambda what: None,
) -> list[Row]:
    """Returns a row for each side.

    Args:
      case: what is measured.
      sides: of whom, in the order of their turns.
      settings: how.
      weights: the file of each peer.
      pythons: what each peer is run by.
      folder: for the files that they are asked by.
      tick: told what comes next, `ticks` times in all.

    Raises:
      Disagreement: their losses are too far apart.
      UserError: a side's process ended.
    """
    requests = dict(zip(sides, cases.ask(case, sides, settings, weights, folder), strict=True))

    def start(side: Side, cache: Path | None = None) -> contextlib.AbstractContextManager:
        tick(f"{side}: starts")
        return process.started(side.peer, pythons[side.peer], requests[side], cache)

    if case.work == "compile":
        ready, timed = _first_steps(start, sides, settings.rounds, folder, tick)
        losses = agree(case, timed)
    else:
        with contextlib.ExitStack() as running:
            started = {side: running.enter_context(start(side)) for side in sides}
            ready = {side: wait() for side, (wait, _) in started.items()}
            steps = {side: step for side, (_, step) in started.items()}
            losses = agree(case, _turns(steps, settings.warmup, tick, "warm-up"))
            timed = _turns(steps, settings.rounds, tick, "timed")
    return [
        Row(
            case=case,
            side=side,
            seconds=tuple(answer["seconds"] for answer in timed[side]),
            losses=losses[side],
            flops=case.flops(settings.steps),
            peak_bytes=max(answer["peak_bytes"] for answer in timed[side]),
            kept_bytes=timed[side][-1]["kept_bytes"],
            **ready[side],
        )
        for side in sides
    ]


def ticks(case: Case, sides: Sequence[Side], settings: Settings) -> int:
    """Returns how often `measure` ticks."""
    each = 2 * settings.rounds if case.work == "compile" else 1 + settings.warmup + settings.rounds
    return len(sides) * each


def _turns(steps: Mapping[Side, process.Ask], rounds: int, tick: Tick, what: str) -> dict[Side, Answers]:
    answers: dict[Side, Answers] = {side: [] for side in steps}
    for _ in range(rounds):
        for side, step in steps.items():
            tick(f"{side}: {what}")
            answers[side].append(step())
    return answers


def _first_steps(
    start: Callable[..., contextlib.AbstractContextManager],
    sides: Sequence[Side],
    rounds: int,
    folder: Path,
    tick: Tick,
) -> tuple[dict[Side, dict], dict[Side, Answers]]:
    """Takes the first step of a process anew in every round, with nothing kept of what was compiled before."""
    ready: dict[Side, dict] = {}
    answers: dict[Side, Answers] = {side: [] for side in sides}
    for number in range(rounds):
        for place, side in enumerate(sides):
            with start(side, folder / f"compiled_{number}_{place}") as (wait, step):
                ready[side] = wait()
                tick(f"{side}: first step")
                answers[side].append(step())
    return ready, answers


def agree(case: Case, answers: Mapping[Side, Answers]) -> dict[Side, tuple[float, ...]]:
    """Returns the losses of the first steps; raises Disagreement where one is too far from the first side's."""
    losses = {side: tuple(answer["loss"] for answer in found[:COMPARED]) for side, found in answers.items()}
    base, expected = next(iter(losses.items()))
    for side, found in losses.items():  # the first too, which may be no number
        bound = max(BOUNDS[base.dtype], BOUNDS[side.dtype])
        for step, (one, other) in enumerate(zip(expected, found, strict=True), 1):
            apart = abs(one - other) / abs(one) if one else abs(other)
            if not apart <= bound:
                raise Disagreement(
                    f"{case}: loss of step {step} is {one:.7g} of {base} and {other:.7g} of {side}, {apart:.1e} apart, "
                    f"should be within {bound:.0e}: no time is believed"
                )
    return losses


# Rows beside each other.


def by_case(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns the rows of each case together."""
    grouped: dict[Case, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.case, []).append(row)
    return list(grouped.values())


def base(row: Row, group: Sequence[Row]) -> Row:
    """Returns what a row's ratio is to: the fastest of the others in its type; where there are none, the first row."""
    others = [other for other in group if other.side.peer != "ours" and other.side.dtype == row.side.dtype]
    return min(others or group[:1], key=lambda other: other.median)


def ratios(row: Row, to: Row) -> list[float]:
    """Returns how many times the time of another a row took, round by round: what both met in a round cancels out."""
    return [own / other for own, other in zip(row.seconds, to.seconds, strict=True)]
