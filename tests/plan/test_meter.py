import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_func.parallel import collectives
from flux_func.plan.devices import DEVICES
from flux_func.plan.meter import Compute, Meter, Send, Wait
from flux_func.plan.predict import Group

H100 = DEVICES["h100"]


def test_memory_is_what_is_alive():
    outside = torch.ones(100)
    with Meter() as meter:
        x = outside * 2
        y = x[:10].view(2, 5)
        assert (meter.live, meter.peak) == (400, 400)
        y = y + 1
        assert (meter.live, meter.peak) == (440, 440)
        del x
        assert (meter.live, meter.peak) == (40, 440)
        outside.add_(1)
        y.mul_(2)
        del y
        assert (meter.live, meter.peak) == (0, 440)
        del outside
        z = torch.ones(50)
        assert (z.nbytes, meter.live) == (200, 200)


def test_what_autograd_keeps_is_alive():
    x = torch.ones(1000).requires_grad_()
    with Meter() as meter:
        y = (x.exp() + 1).sum()
        assert 4000 <= meter.live < 4100
        del y
        assert meter.live == 0


def test_cost_is_of_the_function_alone():
    with Meter() as meter:
        kept = torch.ones(1000)
        out, cost = meter.cost(lambda: (kept * 2 + 1)[:1].clone())
        assert (cost.kept, cost.peak, out.nbytes) == (4, 8000, 4)
        assert meter.peak == 12000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_and_seconds(dtype):
    with FakeTensorMode(), Meter(H100) as meter:
        x, w = torch.empty(64, 128, 512, dtype=dtype), torch.empty(256, 512, dtype=dtype)
        y, cost = meter.cost(F.linear, x, w)
        assert cost.operations == 2 * 64 * 128 * 512 * 256
        moved = dtype.itemsize * (x.numel() + w.numel() + y.numel())
        assert cost.seconds == pytest.approx(H100.seconds(cost.operations, moved, dtype))
        view = meter.cost(lambda: x.view(-1).unflatten(0, (2, -1)).transpose(0, 1))[1]
        assert view.events == ()


def test_operations_of_attention_there_and_back():
    with FakeTensorMode(), Meter(H100) as meter:
        q = torch.empty(2, 4, 64, 32).requires_grad_()
        out, there = meter.cost(F.scaled_dot_product_attention, q, q, q)
        back = meter.cost(torch.autograd.grad, out, q, torch.empty_like(out))[1]
    assert there.operations == 2 * 2 * (2 * 4) * 64 * 64 * 32
    assert back.operations == 2.5 * there.operations


def test_collectives_are_told_apart_and_hold_what_they_send():
    group = Group(("shard",), 4, 0)
    with Meter(H100) as meter:
        x = torch.empty(1000, device="meta")
        gathered = collectives.start_all_gather(x, group)
        del x
        assert meter.live == 4000 + 16000
        again = collectives.start_reduce_scatter(gathered, group)
        gathered = collectives.wait(gathered)
        assert meter.live == 16000 + 4000
        collectives.wait(again)
    (first, second, *waits) = meter.drain()
    assert first == Send(first.number, "all_gather", "shard", 12000)
    assert second == Send(second.number, "reduce_scatter", "shard", 12000)
    assert waits == [Wait(first.number), Wait(second.number)]
    assert meter.events == []


def test_what_is_computed_in_a_row_is_added_up():
    with FakeTensorMode(), Meter(H100) as meter:
        x = torch.empty(10, 10)
        cost = meter.cost(lambda: (x @ x) @ x)[1]
    (event,) = cost.events
    assert isinstance(event, Compute) and event.operations == 4000


def test_fused_optimizers_are_not_computed_without_memory():
    leaves = [torch.empty(8, device="meta")]
    with Meter(H100) as meter:
        step = [torch.empty((), device="meta")]
        torch._fused_adamw_(*[leaves] * 4, [], step, lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8,
                            amsgrad=False, maximize=False)  # fmt: skip
    assert meter.drain()[0].seconds > 0
