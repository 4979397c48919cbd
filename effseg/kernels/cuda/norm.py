"""Kernels of `effseg.kernels.norm`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effseg.kernels.cuda.blocks import cut_rows, n_of, unit_of
from effseg.kernels.cuda.launch import VARYING, dense, launch, row_stride, strides


def moments(rows: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, by runs of voxels and then over the runs."""
    n_samples, n_voxels, n_channels = rows.shape
    cut = cut_rows(n_samples, n_voxels, n_channels)
    unit = unit_of(n_channels, *strides(rows))
    parts = rows.new_empty(2, n_samples, cut.n_runs, n_channels, dtype=torch.float32)
    launch(
        _moments_of_runs,
        (cut.n_blocks_c * cut.n_runs, n_samples),
        rows.device,
        rows,
        *(stride // unit for stride in strides(rows)),
        n_voxels,
        n_channels // unit,
        parts[0],
        parts[1],
        cut.n_runs,
        cut.run_length,
        unit=unit,
        block_v=cut.block_v,
        block_c=cut.block_c,
    )
    n_groups = 1 if over_batch else n_samples
    mean = rows.new_empty(n_groups, n_channels, dtype=torch.float32)
    variance = torch.empty_like(mean)
    launch(
        _moments_of_all,
        (cut.n_blocks_c, n_groups),
        rows.device,
        parts[0],
        parts[1],
        n_voxels,
        n_channels,
        n_samples // n_groups * cut.n_runs,
        cut.n_runs,
        cut.run_length * cut.block_v,
        mean,
        variance,
        block_r=64,
        block_c=cut.block_c,
    )
    return mean, variance


@triton.jit(do_not_specialize=VARYING)
def _moments_of_runs(
    rows,
    sample_stride,
    voxel_stride,
    n_voxels,
    n_channels,
    means,
    spreads,
    n_runs,
    run_length,
    unit: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
):
    """Mean and sum of squares about it, of each run: two passes over each block in registers."""
    voxel_stride *= unit
    n_channels *= unit
    run = tl.program_id(0) % n_runs
    channels = tl.program_id(0) // n_runs * block_c + tl.arange(0, block_c)
    sample = tl.program_id(1)
    is_channel = channels < n_channels
    rows += sample.to(tl.int64) * sample_stride * unit
    here = tl.arange(0, block_v)
    mean = tl.zeros((block_c,), tl.float32)
    spread = tl.zeros((block_c,), tl.float32)
    n_seen = 0.0
    first = run * run_length * block_v
    for start in range(first, min(first + run_length * block_v, n_voxels), block_v):
        is_value = (start + here < n_voxels)[:, None] & is_channel[None, :]
        block = rows + tl.cast(start, tl.int64) * voxel_stride
        x = tl.load(
            block + here[:, None] * voxel_stride + channels[None, :], mask=is_value, other=0.0
        ).to(tl.float32)
        n_new = tl.cast(tl.minimum(n_voxels - start, block_v), tl.float32)
        new_mean = tl.sum(x, 0) / n_new
        away = tl.where(is_value, x - new_mean[None, :], 0.0)
        # Chan, Golub and LeVeque 1983
        share = n_new / (n_seen + n_new)
        apart = new_mean - mean
        spread += tl.sum(away * away, 0) + apart * apart * (n_seen * share)
        mean += apart * share
        n_seen += n_new
    to = (sample * n_runs + run).to(tl.int64) * n_channels + channels
    tl.store(means + to, mean, mask=is_channel)
    tl.store(spreads + to, spread, mask=is_channel)


@triton.jit(do_not_specialize=VARYING)
def _moments_of_all(
    means,
    spreads,
    n_voxels,
    n_channels,
    n_parts,
    n_runs,
    run_voxels,
    mean,
    variance,
    block_r: tl.constexpr,
    block_c: tl.constexpr,
):
    """Those of runs made one: (samples of a group and their runs, channels) to (channels,)."""
    channels = tl.program_id(0) * block_c + tl.arange(0, block_c)
    group = tl.program_id(1)
    is_channel = channels < n_channels
    means += (group * n_parts).to(tl.int64) * n_channels
    spreads += (group * n_parts).to(tl.int64) * n_channels
    total = tl.zeros((block_c,), tl.float32)
    n_values = 0.0
    for first in range(0, n_parts, block_r):
        parts = first + tl.arange(0, block_r)
        is_part = (parts < n_parts)[:, None] & is_channel[None, :]
        n_each = tl.minimum(n_voxels - parts % n_runs * run_voxels, run_voxels).to(tl.float32)
        n_each = tl.where(parts < n_parts, n_each, 0.0)
        of_part = parts[:, None] * n_channels + channels[None, :]
        total += tl.sum(tl.load(means + of_part, mask=is_part, other=0.0) * n_each[:, None], 0)
        n_values += tl.sum(n_each, 0)
    middle = total / n_values
    spread = tl.zeros((block_c,), tl.float32)
    for first in range(0, n_parts, block_r):
        parts = first + tl.arange(0, block_r)
        is_part = (parts < n_parts)[:, None] & is_channel[None, :]
        n_each = tl.minimum(n_voxels - parts % n_runs * run_voxels, run_voxels).to(tl.float32)
        n_each = tl.where(parts < n_parts, n_each, 0.0)
        of_part = parts[:, None] * n_channels + channels[None, :]
        away = tl.load(means + of_part, mask=is_part, other=0.0) - middle[None, :]
        spread += tl.sum(tl.load(spreads + of_part, mask=is_part, other=0.0), 0)
        spread += tl.sum(away * away * n_each[:, None], 0)
    tl.store(mean + group * n_channels + channels, middle, mask=is_channel)
    tl.store(variance + group * n_channels + channels, spread / n_values, mask=is_channel)


def affine_combine(
    gradient: Tensor, factor: Tensor, rows: Tensor, slope: Tensor, offset: Tensor
) -> None:
    """Set gradient = factor * gradient + slope * rows + offset in place."""
    n_samples, n_voxels, n_channels = gradient.shape
    factor, slope, offset = dense(factor), dense(slope), dense(offset)
    cut = cut_rows(n_samples, n_voxels, n_channels)
    unit = unit_of(n_channels, *strides(gradient), *strides(rows))
    launch(
        _affine_combine,
        (cut.n_blocks_c * n_of(n_voxels, cut.block_v), n_samples),
        gradient.device,
        gradient,
        *(stride // unit for stride in strides(gradient)),
        rows,
        *(stride // unit for stride in strides(rows)),
        n_voxels,
        n_channels // unit,
        factor,
        row_stride(factor),
        slope,
        row_stride(slope),
        offset,
        row_stride(offset),
        unit=unit,
        block_v=cut.block_v,
        block_c=cut.block_c,
    )


@triton.jit(do_not_specialize=VARYING)
def _affine_combine(
    gradient,
    gradient_sample_stride,
    gradient_voxel_stride,
    rows,
    sample_stride,
    voxel_stride,
    n_voxels,
    n_channels,
    factor,
    factor_stride,
    slope,
    slope_stride,
    offset,
    offset_stride,
    unit: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
):
    gradient_voxel_stride *= unit
    voxel_stride *= unit
    n_channels *= unit
    n_blocks_c = tl.cdiv(n_channels, block_c)
    channels = tl.program_id(0) % n_blocks_c * block_c + tl.arange(0, block_c)
    first = tl.program_id(0) // n_blocks_c * block_v
    sample = tl.program_id(1)
    here = tl.arange(0, block_v)
    is_channel = channels < n_channels
    is_value = (first + here < n_voxels)[:, None] & is_channel[None, :]
    rows += sample.to(tl.int64) * sample_stride * unit + first.to(tl.int64) * voxel_stride
    gradient += sample.to(tl.int64) * gradient_sample_stride * unit
    gradient += first.to(tl.int64) * gradient_voxel_stride
    x = tl.load(rows + here[:, None] * voxel_stride + channels[None, :], mask=is_value, other=0.0)
    to = gradient + here[:, None] * gradient_voxel_stride + channels[None, :]
    g = tl.load(to, mask=is_value, other=0.0)
    by = tl.load(factor + sample * factor_stride + channels, mask=is_channel, other=0.0)
    a = tl.load(slope + sample * slope_stride + channels, mask=is_channel, other=0.0)
    b = tl.load(offset + sample * offset_stride + channels, mask=is_channel, other=0.0)
    g = b[None, :] + x.to(tl.float32) * a[None, :] + g.to(tl.float32) * by[None, :]
    tl.store(to, g.to(gradient.dtype.element_ty), mask=is_value)
