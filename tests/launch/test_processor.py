import pytest
import torch

from flux_func.launch import processor


@pytest.mark.parametrize(
    "text, expected",
    [("vendor_id\t: AuthenticAMD\nflags\t: avx2\n", True), ("vendor_id\t: GenuineIntel\n", False), (None, False)],
    ids=["AMD", "Intel", "no such file"],
)
def test_onednn_is_for_amd(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert processor.prefers_onednn(tmp_path / "cpuinfo") is expected


def test_onednn_is_not_for_a_torch_that_multiplies_by_another_library(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    (tmp_path / "cpuinfo").write_text("vendor_id: AuthenticAMD")
    assert not processor.prefers_onednn(tmp_path / "cpuinfo")
