"""Where a network computes, and in which numbers."""

import re
from typing import Literal, TypeAlias

import torch

from effseg.errors import PlanError

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
DeviceKind: TypeAlias = Literal["cpu", "cuda"]

DEVICE_NAME = r"^(cpu|cuda(:(0|[1-9][0-9]*))?)$"
"""What effseg runs on; a name without a number means the first of its kind."""

AUTOCAST: dict[Precision, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The type autocast computes in; None switches it off."""


def device_kind(name: str) -> DeviceKind:
    """The kind of a device of this name, which need not be here.

    Raises:
        PlanError: if effseg does not run on such a device.
    """
    if re.fullmatch(DEVICE_NAME, name) is None:
        raise PlanError(f'device {name!r}; expected "cpu", "cuda" or "cuda:<number>"')
    return "cpu" if name == "cpu" else "cuda"


def is_present(name: str) -> bool:
    """Whether the device of this name is in this machine.

    Raises:
        PlanError: as `device_kind`.
    """
    if device_kind(name) == "cpu":
        return True
    return int(name.partition(":")[2] or 0) < torch.cuda.device_count()


def present_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        PlanError: if effseg does not run on it, or it is not here.
    """
    if not is_present(name):
        raise PlanError(
            f"device {name!r}; torch sees {torch.cuda.device_count()} CUDA devices here: "
            "use another, or cpu"
        )
    return torch.device(name)
