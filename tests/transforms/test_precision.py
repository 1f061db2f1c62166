"""Stages computed in another type than their parameters are kept in."""

import torch

from flux_func.flow import path
from flux_func.models import flux
from flux_func.transforms import precision


def test_parameters_are_cast_and_the_loss_stage_is_left_alone():
    wrap = precision.compute_in(torch.bfloat16)
    stem, *_, loss = path.chain(flux.flavor("flux-tiny"))
    seen = wrap(lambda params, carry, const: params, stem)({"a": [torch.ones(2)]}, {}, {})
    assert seen["a"][0].dtype == torch.bfloat16
    fn = object()
    assert wrap(fn, loss) is fn
