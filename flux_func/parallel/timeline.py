"""What a training step is at, told to whoever listens: a clock, a profiler.

    with listening(torch.profiler.record_function):
        with phase("gather"):
            ...

Phases nest. Those of one name for all stages are data, encode, compute, gather, reduce and optimizer; others are the
names of stages.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# From a phase's name to what is entered while it lasts.
Listener = Callable[[str], AbstractContextManager]

_listeners: list[Listener] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Has `listener(name)` entered around every phase, while it is open."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Around a part of a step."""
    with contextlib.ExitStack() as entered:
        for listener in _listeners:
            entered.enter_context(listener(name))
        yield
