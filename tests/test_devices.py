"""Devices by name: known, present, or refused."""

from typing import get_args

import pytest
import torch

from effseg.devices import AUTOCAST, Precision, device_kind, present_device
from effseg.errors import PlanError


@pytest.mark.parametrize(
    ("name", "kind"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:0", "cuda"), ("cuda:7", "cuda")]
)
def test_a_kind_needs_no_device(name, kind) -> None:
    assert device_kind(name) == kind


@pytest.mark.parametrize("name", ["abacus", "mps", "", "cpu:0", "cuda:", "cuda:01", "cuda\n"])
def test_other_devices_are_refused(name) -> None:
    for asked in (device_kind, present_device):
        with pytest.raises(PlanError, match=r"^device '.*; expected \"cpu\""):
            asked(name)


def test_present_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert present_device("cpu") == torch.device("cpu")
    assert present_device("cuda") == torch.device("cuda")
    assert present_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(PlanError, match="sees 1 CUDA devices here"):
        present_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PlanError, match="sees 0 CUDA devices here"):
        present_device("cuda")


def test_every_precision_has_its_autocast() -> None:
    assert set(AUTOCAST) == set(get_args(Precision))
