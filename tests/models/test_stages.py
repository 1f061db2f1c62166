import pytest

from flux_func import tree
from flux_func.models import flux

TINY = flux.flavor("flux-tiny")


def test_stage_parts_reassemble_the_tree():
    params, whole = flux.init(TINY), {}
    for stage in flux.chain(TINY):
        stage.place(whole, stage.select(params))
    assert tree.flatten(whole).keys() == tree.flatten(params).keys()
    assert all(whole["double_blocks"][i] is block for i, block in enumerate(params["double_blocks"]))
    last = flux.chain(TINY)[-2]
    with pytest.raises(ValueError, match=r"single_blocks\.1 should be placed in stage order, there are 0 blocks yet"):
        last.place({}, last.select(params))
