"""A kernel's way onto a card."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from effseg.kernels.cuda.dispatch import KernelError, tf32_is_allowed

VARYING = (
    *("n_samples", "n_voxels", "n_channels", "n_outputs", "n_classes", "widths"),
    *("n_runs", "run_length", "run_voxels", "n_parts", "weight_stride"),
    *("sample_stride", "into_sample_stride", "gradient_sample_stride", "out_sample_stride"),
    *("voxel_stride", "into_voxel_stride", "gradient_voxel_stride", "out_voxel_stride"),
    *("scale_stride", "shift_stride", "factor_stride", "slope_stride", "offset_stride"),
    *("sample_strides", "voxel_strides", "label_sample_stride"),
)
"""Arguments of kernels that Triton is not to compile anew for: what it would read off their values,
alignment, they are told by their unit."""


def strides(rows: Tensor) -> tuple[int, int]:
    """From one sample to the next, 0 where there is but one, and from one voxel to the next."""
    return rows.stride(0) if rows.shape[0] > 1 else 0, rows.stride(1)


def row_stride(statistics: Tensor) -> int:
    """From one sample's row of statistics to the next one's; 0 where all share one."""
    return statistics.stride(0) if statistics.shape[0] > 1 else 0


def dense(rows: Tensor) -> Tensor:
    """Rows whose channels lie side by side, mostly they themselves."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def precision_of(dtype: torch.dtype) -> str:
    """How a kernel multiplies matrices of this type."""
    return "tf32" if dtype == torch.float32 and tf32_is_allowed() else "ieee"


def launch(
    kernel: Any,
    grid: Sequence[int],
    device: torch.device,
    *args: Any,
    n_warps: int = 4,
    n_stages: int = 3,
    **constants: Any,
) -> None:
    """Launch a kernel on this device.

    Args:
        kernel: of `triton.jit`.
        grid: programs along each axis.
        device: where the tensors are.
        args: the kernel's.
        n_warps: of a program.
        n_stages: of its loops' pipeline.
        constants: the kernel's own.

    Raises:
        KernelError: it cannot run there; nothing has been computed.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            kernel[tuple(grid)](
                *args,
                **constants,
                num_warps=n_warps,
                num_stages=n_stages,
                enable_fp_fusion=True,  # the default, which is to change, and of which Triton warns
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers, drivers and launchers raise all kinds
            raise KernelError(f"{type(error).__name__}: {error}") from error
