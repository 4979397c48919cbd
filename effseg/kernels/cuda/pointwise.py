"""Kernels of `effseg.kernels.pointwise`."""

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from effseg.kernels.cuda.blocks import (
    LARGEST_CHANNELS,
    LARGEST_OUTPUTS,
    block_of,
    cut_backward,
    cut_rows,
    n_of,
    unit_of,
)
from effseg.kernels.cuda.dispatch import KernelError
from effseg.kernels.cuda.launch import VARYING, dense, launch, precision_of, row_stride, strides


def affine_act_linear(
    segments: Sequence[Tensor], scale: Tensor, shift: Tensor, weight: Tensor, slope: float
) -> Tensor:
    """act(scale * rows + shift) @ weight.T: each feature is read once, and changed in registers."""
    n_samples, n_voxels, _ = segments[0].shape
    n_outputs = weight.shape[0]
    out = segments[0].new_empty(n_samples, n_voxels, n_outputs)
    weight, scale, shift = dense(weight), dense(scale), dense(shift)
    widths = [segment.shape[2] for segment in segments]
    places = [strides(segment) for segment in segments]
    unit = unit_of(*widths, weight.stride(0), *chain(*places))
    block_v, block_o = 128, block_of(n_outputs, LARGEST_OUTPUTS)
    output_unit = unit_of(n_outputs)
    launch(
        _affine_act_linear,
        (n_of(n_outputs, block_o) * n_of(n_voxels, block_v), n_samples),
        out.device,
        tuple(segments),
        tuple(sample // unit for sample, _ in places),
        tuple(voxel // unit for _, voxel in places),
        tuple(width // unit for width in widths),
        scale,
        row_stride(scale),
        shift,
        row_stride(shift),
        weight,
        weight.stride(0) // unit,
        out,
        n_voxels,
        n_outputs // output_unit,
        n_warps=4 if block_o <= 64 else 8,
        slope=slope,
        unit=unit,
        output_unit=output_unit,
        precision=precision_of(out.dtype),
        block_v=block_v,
        block_c=block_of(max(widths), LARGEST_CHANNELS * 2 // out.element_size()),
        block_o=block_o,
    )
    return out


@triton.jit(do_not_specialize=VARYING)
def _affine_act_linear(
    segments,
    sample_strides,
    voxel_strides,
    widths,
    scale,
    scale_stride,
    shift,
    shift_stride,
    weight,
    weight_stride,
    out,
    n_voxels,
    n_outputs,
    slope: tl.constexpr,
    unit: tl.constexpr,
    output_unit: tl.constexpr,
    precision: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
    block_o: tl.constexpr,
):
    n_outputs *= output_unit
    weight_stride *= unit
    n_blocks_o = tl.cdiv(n_outputs, block_o)
    outputs = tl.program_id(0) % n_blocks_o * block_o + tl.arange(0, block_o)
    first = tl.program_id(0) // n_blocks_o * block_v
    sample = tl.program_id(1)
    here = tl.arange(0, block_v)
    is_voxel = first + here < n_voxels
    is_output = outputs < n_outputs
    scale += sample * scale_stride
    shift += sample * shift_stride
    total = tl.zeros((block_v, block_o), tl.float32)
    for i in tl.static_range(len(segments)):
        stride = voxel_strides[i] * unit
        width = widths[i] * unit
        rows = (
            segments[i]
            + sample.to(tl.int64) * sample_strides[i] * unit
            + first.to(tl.int64) * stride
        )
        for start in range(0, width, block_c):
            channels = start + tl.arange(0, block_c)
            is_channel = channels < width
            x = tl.load(
                rows + here[:, None] * stride + channels[None, :],
                mask=is_voxel[:, None] & is_channel[None, :],
                other=0.0,
            )
            a = tl.load(scale + channels, mask=is_channel, other=0.0)
            b = tl.load(shift + channels, mask=is_channel, other=0.0)
            w = tl.load(
                weight + outputs[None, :] * weight_stride + channels[:, None],
                mask=is_output[None, :] & is_channel[:, None],
                other=0.0,
            )
            wide = activated(x.to(tl.float32) * a[None, :] + b[None, :], slope)
            total = tl.dot(wide.to(w.dtype), w, total, input_precision=precision)
        scale += width
        shift += width
        weight += width
    out += (sample.to(tl.int64) * n_voxels + first) * n_outputs
    tl.store(
        out + here[:, None] * n_outputs + outputs[None, :],
        total.to(out.dtype.element_ty),
        mask=is_voxel[:, None] & is_output[None, :],
    )


def affine_act_linear_backward(
    segments: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    slope: float,
    gradient: Tensor,
    into: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `affine_act_linear`: features and their gradient pass through registers once.

    The widest segment comes first: a card that can take its kernel can take the others'.
    """
    scale, shift, weight = dense(scale), dense(shift), dense(weight)
    weight_gradient = torch.empty_like(weight, dtype=torch.float32)
    sums = torch.empty_like(scale), torch.empty_like(scale)
    stops = list(accumulate(rows.shape[2] for rows in segments))
    parts = sorted(zip(stops, segments, into, strict=True), key=lambda part: -part[1].shape[2])
    for i, (stop, rows, target) in enumerate(parts):
        channels = slice(stop - rows.shape[2], stop)
        try:
            _segment_backward(
                rows,
                scale[:, channels],
                shift[:, channels],
                weight[:, channels],
                slope,
                gradient,
                target,
                weight_gradient[:, channels],
                (sums[0][:, channels], sums[1][:, channels]),
            )
        except KernelError as error:
            if i == 0:
                raise
            # torch's operators would add to the first once more
            raise RuntimeError(f"a card took one segment's kernel, not the next: {error}") from None
    return weight_gradient, *sums


def _segment_backward(
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    slope: float,
    gradient: Tensor,
    into: Tensor,
    weight_gradient: Tensor,
    sums: tuple[Tensor, Tensor],
) -> None:
    """Add to `into`, and set the weight's gradient and the sums.

    A run of voxels has partial sums of its own. As many outputs as a block holds take one kernel;
    for more, one takes the weight's gradient and another, afterwards, the rest.
    """
    n_samples, n_voxels, n_channels = rows.shape
    n_outputs = weight.shape[0]
    unit = unit_of(
        n_channels,
        n_outputs,
        weight.stride(0),
        *strides(rows),
        *strides(into),
        *strides(gradient),
    )
    block_o = block_of(n_outputs, LARGEST_OUTPUTS)
    n_blocks_o = n_of(n_outputs, block_o)
    cut = cut_backward(n_voxels, n_channels, n_outputs)
    of_weight = scale.new_empty(cut.n_runs, n_outputs, n_channels)
    of_norm = scale.new_empty(2, n_samples, cut.n_runs, n_channels)
    launches = [(True, True)] if n_blocks_o == 1 else [(True, False), (False, True)]
    for for_weight, for_input in launches:
        launch(
            _segment_backward_of_runs,
            (cut.n_blocks_c * cut.n_runs, n_blocks_o if for_weight else 1),
            rows.device,
            rows,
            *(stride // unit for stride in strides(rows)),
            into,
            *(stride // unit for stride in strides(into)),
            gradient,
            *(stride // unit for stride in strides(gradient)),
            scale,
            row_stride(scale),
            shift,
            row_stride(shift),
            weight,
            weight.stride(0) // unit,
            of_weight,
            of_norm[0],
            of_norm[1],
            n_samples,
            n_voxels,
            n_channels // unit,
            n_outputs // unit,
            cut.n_runs,
            cut.run_length,
            n_warps=4 if block_o <= 64 else 8,
            slope=slope,
            unit=unit,
            precision=precision_of(rows.dtype),
            for_weight=for_weight,
            for_input=for_input,
            block_v=cut.block_v,
            block_c=cut.block_c,
            block_o=block_o,
        )
    torch.sum(of_weight, 0, out=weight_gradient)
    for partial, whole in zip(of_norm, sums, strict=True):
        torch.sum(partial.view(whole.shape[0], -1, n_channels), 1, out=whole)


@triton.jit(do_not_specialize=VARYING)
def _segment_backward_of_runs(
    rows,
    sample_stride,
    voxel_stride,
    into,
    into_sample_stride,
    into_voxel_stride,
    gradient,
    gradient_sample_stride,
    gradient_voxel_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    weight,
    weight_stride,
    of_weight,
    sums_g,
    sums_gx,
    n_samples,
    n_voxels,
    n_channels,
    n_outputs,
    n_runs,
    run_length,
    slope: tl.constexpr,
    unit: tl.constexpr,
    precision: tl.constexpr,
    for_weight: tl.constexpr,
    for_input: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
    block_o: tl.constexpr,
):
    """A run of every sample, some channels; of the weight, some outputs."""
    voxel_stride *= unit
    into_voxel_stride *= unit
    gradient_voxel_stride *= unit
    weight_stride *= unit
    n_channels *= unit
    n_outputs *= unit
    n_blocks_c = tl.cdiv(n_channels, block_c)
    # programs that run beside each other read the same gradients, of which one finds the other's
    channels = tl.program_id(0) % n_blocks_c * block_c + tl.arange(0, block_c)
    run = tl.program_id(0) // n_blocks_c
    outputs = tl.program_id(1) * block_o + tl.arange(0, block_o)
    here = tl.arange(0, block_v)
    is_channel = channels < n_channels
    is_output = outputs < n_outputs
    weight += channels[None, :]
    first = run * run_length * block_v
    last = min(first + run_length * block_v, n_voxels)
    total = tl.zeros((block_o, block_c), tl.float32)
    if for_weight and for_input:
        w = tl.load(
            weight + outputs[:, None] * weight_stride,
            mask=is_output[:, None] & is_channel[None, :],
            other=0.0,
        )
    for sample in range(0, n_samples):
        a = tl.load(scale + sample * scale_stride + channels, mask=is_channel, other=0.0)
        b = tl.load(shift + sample * shift_stride + channels, mask=is_channel, other=0.0)
        sum_g = tl.zeros((block_c,), tl.float32)
        sum_gx = tl.zeros((block_c,), tl.float32)
        for start in range(first, last, block_v):
            is_voxel = start + here < n_voxels
            is_value = is_voxel[:, None] & is_channel[None, :]
            x = tl.load(
                rows
                + tl.cast(sample, tl.int64) * sample_stride * unit
                + tl.cast(start, tl.int64) * voxel_stride
                + here[:, None] * voxel_stride
                + channels[None, :],
                mask=is_value,
                other=0.0,
            ).to(tl.float32)
            if for_input:  # asked for early, for it is long in coming
                to = (
                    into
                    + tl.cast(sample, tl.int64) * into_sample_stride * unit
                    + tl.cast(start, tl.int64) * into_voxel_stride
                    + here[:, None] * into_voxel_stride
                    + channels[None, :]
                )
                held = tl.load(to, mask=is_value, other=0.0)
            before = x * a[None, :] + b[None, :]
            side = (
                gradient
                + tl.cast(sample, tl.int64) * gradient_sample_stride * unit
                + tl.cast(start, tl.int64) * gradient_voxel_stride
                + here[:, None] * gradient_voxel_stride
            )
            if for_weight:
                g = tl.load(
                    side + outputs[None, :],
                    mask=is_voxel[:, None] & is_output[None, :],
                    other=0.0,
                )
                wide = activated(before, slope).to(g.dtype)
                total = tl.dot(tl.trans(g), wide, total, input_precision=precision)
            if for_input:
                if for_weight:
                    back = tl.dot(g, w, input_precision=precision)
                else:
                    back = tl.zeros((block_v, block_c), tl.float32)
                    for output in range(0, n_outputs, block_o):
                        some = output + tl.arange(0, block_o)
                        is_some = some < n_outputs
                        part = tl.load(
                            side + some[None, :],
                            mask=is_voxel[:, None] & is_some[None, :],
                            other=0.0,
                        )
                        v = tl.load(
                            weight + some[:, None] * weight_stride,
                            mask=is_some[:, None] & is_channel[None, :],
                            other=0.0,
                        )
                        back = tl.dot(part, v, back, input_precision=precision)
                back = before_activation(back, before, slope)
                sum_g += tl.sum(back, 0)
                sum_gx += tl.sum(back * x, 0)
                held = held.to(tl.float32) + back * a[None, :]
                tl.store(to, held.to(into.dtype.element_ty), mask=is_value)
        if for_input:
            place = (sample * n_runs + run) * n_channels + channels
            tl.store(sums_g + place, sum_g, mask=is_channel)
            tl.store(sums_gx + place, sum_gx, mask=is_channel)
    if for_weight:
        place = run.to(tl.int64) * n_outputs * n_channels
        tl.store(
            of_weight + place + outputs[:, None] * n_channels + channels[None, :],
            total,
            mask=is_output[:, None] & is_channel[None, :],
        )


def affine_act(rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """act(scale * rows + shift)."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _write_activated(out, rows, scale, shift, slope)
    return out


def affine_act_(rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> None:
    """Set rows to act(scale * rows + shift) in place."""
    _write_activated(rows, rows, scale, shift, slope)


def _write_activated(out: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: float) -> None:
    n_samples, n_voxels, n_channels = rows.shape
    scale, shift = dense(scale), dense(shift)
    cut = cut_rows(n_samples, n_voxels, n_channels)
    unit = unit_of(n_channels, *strides(rows), *strides(out))
    launch(
        _affine_act,
        (cut.n_blocks_c * n_of(n_voxels, cut.block_v), n_samples),
        rows.device,
        out,
        *(stride // unit for stride in strides(out)),
        rows,
        *(stride // unit for stride in strides(rows)),
        scale,
        row_stride(scale),
        shift,
        row_stride(shift),
        n_voxels,
        n_channels // unit,
        slope=slope,
        unit=unit,
        block_v=cut.block_v,
        block_c=cut.block_c,
    )


@triton.jit(do_not_specialize=VARYING)
def _affine_act(
    out,
    out_sample_stride,
    out_voxel_stride,
    rows,
    sample_stride,
    voxel_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    n_voxels,
    n_channels,
    slope: tl.constexpr,
    unit: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
):
    out_voxel_stride *= unit
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
    out += sample.to(tl.int64) * out_sample_stride * unit + first.to(tl.int64) * out_voxel_stride
    x = tl.load(rows + here[:, None] * voxel_stride + channels[None, :], mask=is_value, other=0.0)
    a = tl.load(scale + sample * scale_stride + channels, mask=is_channel, other=0.0)
    b = tl.load(shift + sample * shift_stride + channels, mask=is_channel, other=0.0)
    wide = activated(x.to(tl.float32) * a[None, :] + b[None, :], slope)
    to = out + here[:, None] * out_voxel_stride + channels[None, :]
    tl.store(to, wide.to(out.dtype.element_ty), mask=is_value)


def activation_backward(
    gradient: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """Turn the gradient into that before the activation, and sum it up."""
    n_samples, n_voxels, n_channels = rows.shape
    scale, shift = dense(scale), dense(shift)
    cut = cut_rows(n_samples, n_voxels, n_channels)
    unit = unit_of(n_channels, *strides(rows), *strides(gradient))
    partial = scale.new_empty(2, n_samples, cut.n_runs, n_channels)
    launch(
        _activation_backward_of_runs,
        (cut.n_blocks_c * cut.n_runs, n_samples),
        rows.device,
        gradient,
        *(stride // unit for stride in strides(gradient)),
        rows,
        *(stride // unit for stride in strides(rows)),
        scale,
        row_stride(scale),
        shift,
        row_stride(shift),
        partial[0],
        partial[1],
        n_voxels,
        n_channels // unit,
        cut.n_runs,
        cut.run_length,
        slope=slope,
        unit=unit,
        block_v=cut.block_v,
        block_c=cut.block_c,
    )
    sum_g, sum_gx = partial.view(2, scale.shape[0], -1, n_channels)
    return sum_g.sum(1), sum_gx.sum(1)


@triton.jit(do_not_specialize=VARYING)
def _activation_backward_of_runs(
    gradient,
    gradient_sample_stride,
    gradient_voxel_stride,
    rows,
    sample_stride,
    voxel_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    sums_g,
    sums_gx,
    n_voxels,
    n_channels,
    n_runs,
    run_length,
    slope: tl.constexpr,
    unit: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
):
    gradient_voxel_stride *= unit
    voxel_stride *= unit
    n_channels *= unit
    run = tl.program_id(0) % n_runs
    channels = tl.program_id(0) // n_runs * block_c + tl.arange(0, block_c)
    sample = tl.program_id(1)
    here = tl.arange(0, block_v)
    is_channel = channels < n_channels
    rows += sample.to(tl.int64) * sample_stride * unit
    gradient += sample.to(tl.int64) * gradient_sample_stride * unit
    a = tl.load(scale + sample * scale_stride + channels, mask=is_channel, other=0.0)
    b = tl.load(shift + sample * shift_stride + channels, mask=is_channel, other=0.0)
    sum_g = tl.zeros((block_c,), tl.float32)
    sum_gx = tl.zeros((block_c,), tl.float32)
    first = run * run_length * block_v
    for start in range(first, min(first + run_length * block_v, n_voxels), block_v):
        is_value = (start + here < n_voxels)[:, None] & is_channel[None, :]
        block = rows + tl.cast(start, tl.int64) * voxel_stride
        to = gradient + tl.cast(start, tl.int64) * gradient_voxel_stride
        to += here[:, None] * gradient_voxel_stride + channels[None, :]
        x = tl.load(
            block + here[:, None] * voxel_stride + channels[None, :], mask=is_value, other=0.0
        ).to(tl.float32)
        g = tl.load(to, mask=is_value, other=0.0).to(tl.float32)
        g = before_activation(g, x * a[None, :] + b[None, :], slope)
        tl.store(to, g.to(gradient.dtype.element_ty), mask=is_value)
        sum_g += tl.sum(g, 0)
        sum_gx += tl.sum(g * x, 0)
    place = (sample * n_runs + run) * n_channels + channels
    tl.store(sums_g + place, sum_g, mask=is_channel)
    tl.store(sums_gx + place, sum_gx, mask=is_channel)


@triton.jit
def activated(before, slope: tl.constexpr):
    """The activation; what is not a number stays none."""
    if slope == 0:
        return tl.where(before < 0, 0.0, before)
    return tl.where(before < 0, slope * before, before)


@triton.jit
def before_activation(gradient, before, slope: tl.constexpr):
    """The gradient before the activation, from that after it."""
    if slope == 0:
        return tl.where(before > 0, gradient, 0.0)
    return tl.where(before > 0, gradient, slope * gradient)
