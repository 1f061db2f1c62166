import pytest
import torch

from flux_func.train import transfer

CPU, META = torch.device("cpu"), torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_what_is_there_already_is_not_copied():
    x = torch.randn(3)
    assert transfer.to_device(x, CPU) is x and transfer.to_host(x) is x
    there = x.to(META)
    assert transfer.to_device(there, META) is there


def test_it_gets_there():
    assert transfer.to_device(torch.randn(3, 2), META).shape == (3, 2)
    assert transfer.to_device(torch.randn(3, 2), META).device == META


@needs_cuda
def test_copies_arrive_whole_while_the_device_is_busy():
    device, x = torch.device("cuda"), torch.randn(1 << 22)
    busy = torch.randn(4096, 4096, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            busy = busy @ busy / 4096
        there = [transfer.to_device(x + i, device) for i in range(4)]
        back = [transfer.to_host(2 * y) for y in there]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert back[0].is_pinned()
    torch.cuda.synchronize()
    assert all(torch.equal(y, 2 * (x + i)) for i, y in enumerate(back))
