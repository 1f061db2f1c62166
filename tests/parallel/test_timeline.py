import contextlib

import pytest
import torch

from flux_func.models import flux
from flux_func.parallel import fold, timeline
from flux_func.parallel.timeline import listening, phase
from tests.helpers import tiny_model


class Heard:
    """A listener that notes what begins ("+") and ends ("-")."""

    def __init__(self):
        self.said = []

    @contextlib.contextmanager
    def __call__(self, name):
        self.said.append(f"+{name}")
        try:
            yield
        finally:
            self.said.append(f"-{name}")


def test_listeners_hear_of_every_phase_while_they_listen_and_of_no_other():
    one, other = Heard(), Heard()
    with phase("before"):
        pass
    with listening(one):
        with phase("outer"), listening(other), phase("inner"):
            pass
        with phase("after"):
            pass
    with phase("late"):
        pass
    assert one.said == ["+outer", "+inner", "-inner", "-outer", "+after", "-after"]
    assert other.said == ["+inner", "-inner"]


def test_a_phase_that_breaks_ends_too():
    heard = Heard()
    with pytest.raises(ZeroDivisionError), listening(heard), phase("outer"), phase("inner"):
        raise ZeroDivisionError
    assert heard.said == ["+outer", "+inner", "-inner", "-outer"]
    assert timeline._listeners == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_fold_names_its_stages_there_and_back_and_one_process_moves_nothing(remat):
    params, batch, heard = tiny_model.params(tiny_model.DEEPER), tiny_model.batch(), Heard()
    quiet, _ = fold.grad_and_value(params, tiny_model.DEEPER, batch, remat=remat)
    with listening(heard):
        grads, _ = fold.grad_and_value(params, tiny_model.DEEPER, batch, remat=remat)
    there = [stage.name for stage in flux.chain(tiny_model.DEEPER) if stage.keys]
    expected = [*there, *(f"{name} backward" for name in reversed(there))]
    assert heard.said == [f"{sign}{name}" for name in expected for sign in "+-"]
    assert torch.equal(grads["img_in"]["weight"], quiet["img_in"]["weight"])
