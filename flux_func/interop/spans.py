"""Weight formats as tables of rows: which rows of a format's tensors are which rows of our leaves.

Every format of FLUX holds the same numbers under other names, some tensors cut or joined along their first dimension
(query, key and value apart or as one; shift and scale in either order). So a format is a one-to-one table of spans of
rows, read from left to right to load and from right to left to save, a tensor at a time and without arithmetic.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Shape = tuple[int, ...]
# (name, first row, row after the last) to those rows, [rows, ...].
Rows = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Span:
    """`rows` rows of our leaf `path` from row `start` on: those of the format's tensor `name` from `name_start` on."""

    path: str
    start: int
    name: str
    name_start: int
    rows: int


@dataclass(frozen=True)
class Layout:
    """One model in one format.

    Attributes:
      ours: {dotted path: shape} of our leaves.
      theirs: {name: shape} of the format's tensors; shapes differ from ours beyond the first dimension only by
        dimensions of size one.
      spans: the table, in which every row of either side is there once.
    """

    ours: Mapping[str, Shape]
    theirs: Mapping[str, Shape]
    spans: tuple[Span, ...]

    @cached_property
    def _by_path(self) -> dict[str, list[Span]]:
        return _grouped(self.spans, "path", "start")

    @cached_property
    def _by_name(self) -> dict[str, list[Span]]:
        return _grouped(self.spans, "name", "name_start")

    def leaf(self, path: str, read: Rows) -> Tensor:
        """Returns our leaf `path`, its rows read from the format's tensors."""
        parts = [read(span.name, span.name_start, span.name_start + span.rows) for span in self._by_path[path]]
        return _joined(parts).reshape(self.ours[path])

    def tensor(self, name: str, read: Rows) -> Tensor:
        """Returns the format's tensor `name`, its rows read from our leaves."""
        parts = [read(span.path, span.start, span.start + span.rows) for span in self._by_name[name]]
        return _joined(parts).reshape(self.theirs[name])

    def leaf_types(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """Returns {our path: type}, given the types of the format's tensors."""
        return {path: widest(dtypes[span.name] for span in spans) for path, spans in self._by_path.items()}

    def tensor_types(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """Returns {the format's name: type}, given the types of our leaves."""
        return {name: widest(dtypes[span.path] for span in spans) for name, spans in self._by_name.items()}

    def rows(self, path: str, start: int, stop: int, read: Rows) -> Tensor:
        """Returns some rows of our leaf `path`, read from the format's tensors: a `Rows` once `read` is bound."""
        parts = []
        for span in self._by_path[path]:
            first, last = max(start, span.start), min(stop, span.start + span.rows)
            if first < last:
                shift = span.name_start - span.start
                parts.append(read(span.name, first + shift, last + shift))
        return _joined(parts).reshape(stop - start, *self.ours[path][1:])


def layout(ours: Mapping[str, Shape], pieces: Callable[[str, Shape], Iterable[tuple[str, int, int]]]) -> Layout:
    """Returns the layout in which our leaf `path` is the concatenation of `pieces(path, shape)`, by rows.

    Args:
      ours: {dotted path: shape} of our leaves.
      pieces: each (name, first row of it, rows).
    """
    spans, sizes, shapes = [], dict[str, int](), dict[str, Shape]()
    for path, shape in ours.items():
        start = 0
        for name, name_start, rows in pieces(path, shape):
            spans.append(Span(path, start, name, name_start, rows))
            sizes[name], shapes[name] = sizes.get(name, 0) + rows, shape[1:]
            start += rows
    return Layout(ours, {name: (rows, *shapes[name]) for name, rows in sizes.items()}, tuple(spans))


def _grouped(spans: Iterable[Span], key: str, order: str) -> dict[str, list[Span]]:
    groups: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: getattr(span, order)):
        groups.setdefault(getattr(span, key), []).append(span)
    return groups


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Returns the narrowest type that holds every value of these floating types."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    # torch promotes no type of eight bits; bfloat16 holds them all.
    return functools.reduce(torch.promote_types, (torch.bfloat16 if kind.itemsize == 1 else kind for kind in kinds))


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    dtype = widest(part.dtype for part in parts)
    return torch.cat([part.to(dtype) for part in parts])
