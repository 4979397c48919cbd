"""What the kernels allocate beside their results: partial sums, for whoever predicts memory."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from effseg.kernels.class_tiles import N_SUMS
from effseg.kernels.cuda.blocks import cut_backward, cut_head, cut_rows
from effseg.kernels.cuda.dispatch import fits_head, fits_head_backward, fits_matrices, fits_rows

FLOAT, DOUBLE = 4, 8


def partial_bytes(name: str, args: Sequence[Any]) -> tuple[int, ...] | None:
    """Of each request that a kernel makes to the allocator while it runs.

    Args:
        name: the operator's, `effseg::moments`.
        args: of the call; of tensors, types, shapes and strides are looked at.

    Returns:
        None where no kernel runs but torch's own operators.
    """
    if name not in PARTIALS:
        return None
    fits, bytes_of = PARTIALS[name]
    return bytes_of(*args) if fits(*args) else None


def _none(*_: object) -> tuple[int, ...]:
    return ()


def _of_rows(rows: Tensor, *_: object) -> tuple[int, ...]:
    n_samples, n_voxels, n_channels = rows.shape
    cut = cut_rows(n_samples, n_voxels, n_channels)
    return (2 * FLOAT * n_samples * cut.n_runs * n_channels,)


def _of_backward(
    segments: Sequence[Tensor], scale: Tensor, shift: Tensor, weight: Tensor, *_: object
) -> tuple[int, ...]:
    """One segment after the other: those of the segment that takes most."""
    n_outputs = weight.shape[0]
    found = []
    for n_samples, n_voxels, n_channels in (segment.shape for segment in segments):
        n_runs = cut_backward(n_voxels, n_channels, n_outputs).n_runs
        each = FLOAT * n_runs * n_channels
        found.append((each * n_outputs, 2 * each * n_samples))
    return max(found, key=sum)


def _of_head(rows: Tensor, weight: Tensor, *_: object) -> tuple[int, ...]:
    n_samples, n_voxels, n_channels = rows.shape
    n_runs = cut_head(n_samples, n_voxels, n_channels, len(weight)).n_runs
    return (DOUBLE * n_samples * n_runs * N_SUMS * len(weight),)


def _of_head_backward(
    rows: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *_: object
) -> tuple[int, ...]:
    n_samples, n_voxels, n_channels = rows.shape
    n_classes = weight.shape[0]
    n_runs = n_samples * cut_head(n_samples, n_voxels, n_channels, n_classes).n_runs
    of_weight, of_bias = FLOAT * n_runs * n_classes * n_channels, FLOAT * n_runs * n_classes
    of_norm = 0 if scale is None else 2 * FLOAT * n_runs * n_channels
    slopes = FLOAT * n_samples * N_SUMS * n_classes
    return tuple(filter(None, (of_weight, of_bias, of_norm, slopes)))


PARTIALS: dict[str, tuple[Callable[..., bool], Callable[..., tuple[int, ...]]]] = {
    "effseg::moments": (fits_rows, _of_rows),
    "effseg::affine_combine": (fits_rows, _none),
    "effseg::affine_act": (fits_rows, _none),
    "effseg::affine_act_": (fits_rows, _none),
    "effseg::activation_backward": (fits_rows, _of_rows),
    "effseg::affine_act_linear": (fits_matrices, _none),
    "effseg::affine_act_linear_backward": (fits_matrices, _of_backward),
    "effseg::head_sums": (fits_head, _of_head),
    "effseg::head_sums_backward": (fits_head_backward, _of_head_backward),
}
