"""Plans in words, in tables and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux_func.parallel.mesh import AXES
from flux_func.plan.devices import RESERVED, Cluster
from flux_func.plan.predict import Plan
from flux_func.plan.trace import Trace

GIB = 2**30
MEMBERS = {"params": "parameters", "opt": "moments", "ema": "average", "base": "weights under the LoRA"}
# Meshes in a comparison.
MOST = 12


@dataclass(frozen=True)
class Case:
    """A plan on machines.

    Attributes:
      cluster: the machines.
      plan: what a step takes.
      batch: samples in a step.
      asked: floating-point operations that the model's formula counts in a step, nothing computed twice.
    """

    cluster: Cluster
    plan: Plan
    batch: int
    asked: float

    @property
    def fits(self) -> bool:
        """Returns whether the memory does."""
        return self.plan.peak <= self.cluster.device.room

    @property
    def processes(self) -> int:
        """Returns how many devices there are."""
        count = 1
        for axis in AXES:
            count *= self.cluster.sizes[axis]
        return count

    @property
    def mfu(self) -> float:
        """Returns the share of the devices' bfloat16 peak that the asked operations are."""
        return self.asked / self.plan.seconds / self.processes / self.cluster.device.peak[2]


def comparison(cases: Sequence[Case], refused: Sequence[tuple[Mapping[str, int], str]]) -> str:
    """Returns a table of meshes, as they are ordered, and one reason of those that cannot be."""
    rows = [
        (
            _mesh(case.cluster.sizes),
            f"{case.plan.peak / GIB:,.1f}",
            "yes" if case.fits else "no",
            f"{case.plan.seconds:,.3f}",
            f"{case.plan.exposed:,.3f}",
            f"{case.batch / case.plan.seconds:,.1f}",
            f"{case.mfu:.1%}",
        )
        for case in cases[:MOST]
    ]
    lines = [_table(("mesh", "GiB", "fits", "s/step", "exposed", "samples/s", "MFU"), rows)]
    if len(cases) > MOST:
        lines.append(f"and {len(cases) - MOST} more")
    if refused:
        sizes, reason = refused[0]
        lines.append(f"{len(refused)} meshes cannot be, such as {_mesh(sizes)}: {reason}")
    return "\n".join([*lines, ""])


def details(case: Case) -> str:
    """Returns memory, communication and time of a plan."""
    return "\n\n".join([_memory(case), _communication(case), _time(case)])


def _memory(case: Case) -> str:
    plan, device = case.plan, case.cluster.device
    where = " (in the host's memory)" if plan.offload else ""
    rows = [(f"{MEMBERS[name]}{where}", _gib(plan.state[name])) for name in MEMBERS if name in plan.state]
    rows += [(f"{name}, frozen", _gib(size)) for name, size in plan.frozen.items()]
    rows += [(f"{name}, at the peak", _gib(size)) for name, size in plan.memory.items()]
    rows.append(("in all", _gib(plan.peak)))
    verdict = "fits" if case.fits else "does not fit"
    last = (
        f"{verdict}: {device.name} has {_gib(device.memory)} GiB, of which {RESERVED:.0%} is left to CUDA, NCCL and "
        f"fragments: {_gib(device.room)}"
    )
    return f"{_table(('memory of a process', 'GiB'), rows)}\n{last}"


def _communication(case: Case) -> str:
    if not case.plan.sent:
        return "nothing is sent"
    rows = []
    for (kind, group), sent in sorted(case.plan.sent.items()):
        between = sent * case.cluster.crossing(kind, tuple(group.split(" x ")))
        rows.append((kind, group, f"{(sent - between) / 1e9:,.3f}", f"{between / 1e9:,.3f}"))
    return _table(("sent by a process in a step", "over", "GB inside a node", "GB between nodes"), rows)


def _time(case: Case) -> str:
    plan = case.plan
    return (
        f"a step takes {plan.seconds:,.3f} s: {plan.compute:,.3f} s of computing ({plan.operations / 1e12:,.1f} TFLOP) "
        f"and {plan.exposed:,.3f} s of waiting for communication, which takes {plan.communication:,.3f} s\n"
        f"{case.batch / plan.seconds:,.1f} samples/s, MFU {case.mfu:.1%}"
    )


def against(found: tuple[Plan, Trace]) -> str:
    """Returns a plan beside the trace of the same step."""
    plan, traced = found
    rows = [
        ("state, GiB", _gib(sum(plan.state.values())), _gib(traced.state)),
        ("everything else, GiB", _gib(plan.working), _gib(traced.working)),
        *(
            (f"{kind} over {group}, GB", f"{plan.sent.get((kind, group), 0) / 1e9:,.3f}", f"{sent / 1e9:,.3f}")
            for (kind, group), sent in sorted(traced.sent.items())
        ),
    ]
    return "\n" + _table(("without encoders", "planned", "traced"), rows)


def to_json(case: Case) -> dict[str, Any]:
    """Returns a plan as JSON holds it."""
    plan, cluster = case.plan, case.cluster
    return {
        "mesh": dict(cluster.sizes),
        "device": cluster.device.name,
        "node": cluster.node,
        "fits": case.fits,
        "bytes": {
            "state": dict(plan.state),
            "frozen": dict(plan.frozen),
            "at_the_peak": dict(plan.memory),
            "in_all": plan.peak,
            "room": cluster.device.room,
        },
        "sent": [
            {
                "collective": kind,
                "over": group,
                "bytes": sent,
                "between_nodes": sent * cluster.crossing(kind, tuple(group.split(" x "))),
            }
            for (kind, group), sent in plan.sent.items()
        ],
        "operations": plan.operations,
        "seconds": {
            "step": plan.seconds,
            "compute": plan.compute,
            "communication": plan.communication,
            "exposed": plan.exposed,
        },
        "samples_per_s": case.batch / plan.seconds,
        "mfu": case.mfu,
    }


def _mesh(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES)


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}" if size < GIB else f"{size / GIB:,.2f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns rows under a head, what is counted to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if not place or not _counts(rows, place) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _counts(rows: Sequence[tuple[str, ...]], place: int) -> bool:
    return all(row[place].strip("-%").replace(",", "").replace(".", "").isdigit() for row in rows)
