import pytest
import torch

from flux_func.train.stateless import Stateless


def test_steps_are_the_classs_own_and_nothing_is_left_on_the_tensors():
    adam = Stateless(torch.optim.Adam, {"betas": (0.5, 0.75)})
    leaves, kept = [torch.ones(3), torch.ones(2, 2)], []
    kept = [adam.zeros({"a": leaf})["a"] for leaf in leaves]
    expected = [leaf.clone() for leaf in leaves]
    reference = torch.optim.Adam(expected, lr=0.1, betas=(0.5, 0.75))
    for step in range(3):
        grads = [torch.full_like(leaf, step + 1.0) for leaf in leaves]
        adam.step(leaves, grads, kept, 0.1, first=not step)
        for leaf, grad in zip(expected, grads, strict=True):
            leaf.grad = grad
        reference.step()
    for leaf, own, alike in zip(leaves, kept, expected, strict=True):
        assert torch.equal(leaf, alike) and leaf.grad is None
        assert own.keys() == reference.state[alike].keys()
        assert all(torch.equal(value, reference.state[alike][name]) for name, value in own.items())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_kept_has_its_shapes_and_types_before_the_first_step(device):
    params = {"a": torch.ones(4, 3, dtype=torch.bfloat16, device=device), "b": torch.ones(4, 3, device=device)}
    kept = Stateless(torch.optim.Adafactor, {}).zeros(params)
    forms = {name: {key: (tuple(leaf.shape), leaf.dtype) for key, leaf in own.items()} for name, own in kept.items()}
    assert forms["a"]["row_var"] == ((4, 1), torch.bfloat16) and forms["b"]["col_var"] == ((1, 3), torch.float32)
    assert all(leaf.device.type == device for own in kept.values() for leaf in own.values())


def test_counts_that_a_kernel_reads_stay_where_they_are():
    count, moment = torch.zeros((), device="meta"), torch.zeros(3, device="meta")
    fused = Stateless(torch.optim.Adam, {"fused": True})
    assert fused.home(count) is count and fused.home(moment) is moment
    plain = Stateless(torch.optim.Adam, {})
    assert plain.home(moment) is moment and plain.home(torch.zeros(())).device.type == "cpu"
    with pytest.raises(NotImplementedError):  # it was to be moved, and a tensor without numbers cannot be
        plain.home(count)


def test_what_is_no_tensor_cannot_be_kept():
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                self.state[param]["calls"] = 1

    with pytest.raises(ValueError, match="Counts keeps calls as int, which is not a tensor"):
        Stateless(Counts, {}).zeros({"a": torch.zeros(2)})
