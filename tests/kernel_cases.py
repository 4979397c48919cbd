"""Arguments for every operator that has a kernel for CUDA: what is compared, there and without."""

import torch
from torch import Tensor

from effseg.kernels.cuda import KERNELS

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest value: a few roundings to the type, which sums of many values even out."""

SIZES = {
    "odd": (2, 133, (23, 6), 21, 2),
    "one": (1, 1, (1,), 1, 1),
    "wide": (2, 70, (72, 16, 33), 130, 1),
}
"""Samples, voxels, the segments' channels, outputs or classes, rows of statistics."""

OPERATORS = {operator._init_fn.__name__: operator for operator in KERNELS}


def arguments(name: str, size: str, dtype: torch.dtype, device: str = "cpu") -> list[object]:
    """Of an operator; features are slices of wider rows."""
    n_samples, n_voxels, widths, n_outputs, n_rows = SIZES[size]
    generator = torch.Generator().manual_seed(7)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def rows(n_channels: int) -> Tensor:
        wider = values(n_samples, n_voxels, n_channels + 5).to(device, dtype)
        return wider[:, :, 2 : 2 + n_channels]

    def statistics(n_channels: int) -> Tensor:
        return values(n_rows, n_channels + 1)[:, 1:].to(device)

    total, first = sum(widths), widths[0]
    segments, into = ([rows(width) for width in widths] for _ in range(2))
    weight = (values(n_outputs, total) / total**0.5).to(device, dtype)
    row = statistics(first)
    if name == "moments":
        return [segments[0] + 3, n_rows == 1]
    if name == "affine_combine":
        return [into[0], row, segments[0], statistics(first), statistics(first)]
    if name in ("affine_act", "affine_act_"):
        return [segments[0], row, statistics(first), 0.0]
    if name == "activation_backward":
        return [into[0], segments[0], row, statistics(first), 0.01]
    norm = statistics(total), statistics(total)
    if name == "affine_act_linear":
        return [segments, *norm, weight, 0.01]
    if name == "affine_act_linear_backward":
        gradient = values(n_samples, n_voxels, n_outputs).to(device, dtype)
        return [segments, *norm, weight, 0.0, gradient, into]
    return head_arguments(
        name, segments[0], weight[:, :first].contiguous(), row if size != "one" else None
    )


def head_arguments(
    name: str, rows: Tensor, weight: Tensor, scale: Tensor | None, *, focal_gamma: float = 1.5
) -> list[object]:
    """Of a head: some labels are ignored, some no class at all."""
    n_classes = min(len(weight), 128)
    shape = rows.shape[:2]
    generator = torch.Generator().manual_seed(11)
    labels = torch.randint(-1, n_classes + 1, shape, generator=generator).to(torch.int16)
    bias = None if scale is None else torch.linspace(-1, 1, n_classes).to(weight)
    shift = None if scale is None else scale.flip(1)
    head = [rows, weight[:n_classes], bias, scale, shift, 0.01]
    counted = [labels.to(rows.device), -1, focal_gamma]
    if name == "head_sums":
        return [*head, *counted]
    slopes = torch.randn(shape[0], 5, n_classes, generator=generator, dtype=torch.float64)
    return [*head, *counted, slopes.to(rows.device)]


def copied(given: object, dtype: torch.dtype | None = None) -> object:
    """The same arguments in other memory, features and statistics in another type."""
    if isinstance(given, list):
        return [copied(each, dtype) for each in given]
    if not isinstance(given, Tensor):
        return given
    wide = dtype if dtype is not None and given.is_floating_point() else given.dtype
    return given.clone().to(wide)


def results(name: str, run, given: list[object]) -> list[Tensor]:
    """What an operator returns, and what it writes into."""
    returned = run(*given)
    written = {
        "affine_combine": given[:1],
        "affine_act_": given[:1],
        "activation_backward": given[:1],
        "affine_act_linear_backward": given[-1],
    }.get(name, [])
    if returned is None:
        returned = ()
    elif isinstance(returned, Tensor):
        returned = (returned,)
    return [*returned, *written]


def assert_agree(given: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within the tolerance of its largest value, and nowhere not a number."""
    assert len(given) == len(expected) > 0
    for one, other in zip(given, expected, strict=True):
        assert one.shape == other.shape
        if one.numel():
            error = (one.double() - other.double()).abs().max().item()
            largest = max(1.0, other.double().abs().max().item())
            assert error <= tolerance * largest, f"{error / largest:.1e} of the largest value"
