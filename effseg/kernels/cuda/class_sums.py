"""Kernels of `effseg.kernels.class_sums`: a block's logits and softmax stay in registers.

For the five sums of a softmax alone; `dispatch.fits_head` leaves the rest to torch's operators.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effseg.kernels.class_tiles import N_SUMS
from effseg.kernels.cuda.blocks import LARGEST_CLASSES, Cut, block_of, cut_head, unit_of
from effseg.kernels.cuda.launch import VARYING, dense, launch, precision_of, row_stride, strides
from effseg.kernels.cuda.pointwise import activated, before_activation


def head_sums(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    labels: Tensor,
    ignore_label: int | None,
    focal_gamma: float,
    *_: object,
) -> Tensor:
    """The sums of the logits: float32 within a block of voxels, float64 beyond."""
    n_samples, n_voxels, n_channels = rows.shape
    weight = dense(weight)
    n_classes = weight.shape[0]
    block_k = block_of(n_classes, LARGEST_CLASSES)
    cut = cut_head(n_samples, n_voxels, n_channels, n_classes)
    unit = unit_of(n_channels, weight.stride(0), *strides(rows))
    sums = rows.new_empty(n_samples, cut.n_runs, N_SUMS, n_classes, dtype=torch.float64)
    launch(
        _head_sums_of_runs,
        (cut.n_runs, n_samples),
        rows.device,
        *_head(rows, weight, bias, scale, shift, labels, cut, unit),
        sums,
        n_warps=4 if block_k <= 64 else 8,
        ignore_label=ignore_label,
        focal_gamma=focal_gamma,
        n_sums=N_SUMS,
        slope=slope,
        unit=unit,
        precision=precision_of(rows.dtype),
        block_v=cut.block_v,
        block_c=cut.block_c,
        block_k=block_k,
    )
    return sums.sum(1)


def head_sums_backward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: float,
    labels: Tensor,
    ignore_label: int | None,
    focal_gamma: float,
    gradient: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of `head_sums`; programs that share voxels each make their logits anew."""
    n_samples, n_voxels, n_channels = rows.shape
    weight = dense(weight)
    n_classes = weight.shape[0]
    block_k = block_of(n_classes, LARGEST_CLASSES)
    cut = cut_head(n_samples, n_voxels, n_channels, n_classes)
    into = torch.empty_like(rows)
    unit = unit_of(n_channels, weight.stride(0), *strides(rows), *strides(into))
    of_weight, of_bias = (
        rows.new_empty(n_samples * cut.n_runs, n_classes, *width, dtype=torch.float32)
        for width in ((n_channels,), ())
    )
    of_norm = rows.new_empty(
        2, n_samples, cut.n_runs, 0 if scale is None else n_channels, dtype=torch.float32
    )
    launch(
        _head_sums_backward_of_runs,
        (cut.n_blocks_c * cut.n_runs, n_samples),
        rows.device,
        *_head(rows, weight, bias, scale, shift, labels, cut, unit),
        gradient.to(torch.float32).contiguous(),
        into,
        *(stride // unit for stride in strides(into)),
        into.stride(2),
        of_weight,
        of_bias,
        of_norm[0],
        of_norm[1],
        n_warps=4 if block_k <= 64 else 8,
        n_stages=2,
        ignore_label=ignore_label,
        focal_gamma=focal_gamma,
        n_sums=N_SUMS,
        slope=slope,
        unit=unit,
        precision=precision_of(rows.dtype),
        block_v=cut.block_v,
        block_c=cut.block_c,
        block_k=block_k,
    )
    if scale is None:
        of_scale, of_shift = (of_norm.new_empty(0, 0) for _ in range(2))
    else:
        of_shift, of_scale = (
            part.sum(1) for part in of_norm.view(2, scale.shape[0], -1, n_channels)
        )
    return into, of_weight.sum(0), of_bias.sum(0), of_scale, of_shift


def _head(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    labels: Tensor,
    cut: Cut,
    unit: int,
) -> tuple[object, ...]:
    """What both kernels take first."""
    norm: tuple[object, ...] = (None, 0, None, 0)
    if scale is not None and shift is not None:
        scale, shift = dense(scale), dense(shift)
        norm = (scale, row_stride(scale), shift, row_stride(shift))
    return (
        rows,
        *(stride // unit for stride in strides(rows)),
        rows.stride(2),
        weight,
        weight.stride(0) // unit,
        bias,
        *norm,
        labels,
        *labels.stride(),
        rows.shape[1],
        rows.shape[2] // unit,
        weight.shape[0],
        cut.n_runs,
        cut.run_length,
    )


@triton.jit(do_not_specialize=VARYING)
def _head_sums_of_runs(
    rows,
    sample_stride,
    voxel_stride,
    channel_stride,
    weight,
    weight_stride,
    bias,
    scale,
    scale_stride,
    shift,
    shift_stride,
    labels,
    label_sample_stride,
    label_stride,
    n_voxels,
    n_channels,
    n_classes,
    n_runs,
    run_length,
    sums,
    ignore_label: tl.constexpr,
    focal_gamma: tl.constexpr,
    n_sums: tl.constexpr,
    slope: tl.constexpr,
    unit: tl.constexpr,
    precision: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
    block_k: tl.constexpr,
):
    voxel_stride *= unit
    weight_stride *= unit
    n_channels *= unit
    run = tl.program_id(0)
    sample = tl.program_id(1)
    here = tl.arange(0, block_v)
    classes = tl.arange(0, block_k)
    is_class = classes < n_classes
    rows += sample.to(tl.int64) * sample_stride * unit
    labels += sample.to(tl.int64) * label_sample_stride
    if scale is not None:
        scale += sample * scale_stride
        shift += sample * shift_stride
    intersection = tl.zeros((block_k,), tl.float64)
    predicted = tl.zeros((block_k,), tl.float64)
    reference = tl.zeros((block_k,), tl.float64)
    log_likelihood = tl.zeros((block_k,), tl.float64)
    focal = tl.zeros((block_k,), tl.float64)
    first = run * run_length * block_v
    for start in range(first, min(first + run_length * block_v, n_voxels), block_v):
        is_voxel = start + here < n_voxels
        z = _logits(
            rows + tl.cast(start, tl.int64) * voxel_stride,
            voxel_stride,
            channel_stride,
            weight,
            weight_stride,
            bias,
            scale,
            shift,
            n_channels,
            n_classes,
            is_voxel,
            slope,
            precision,
            block_v,
            block_c,
            block_k,
        )
        label = tl.load(labels + tl.cast(start + here, tl.int64) * label_stride, mask=is_voxel)
        p, own, log_p = _softmax(z, label, is_voxel, n_classes, ignore_label, block_k)
        own_log_p = tl.where(own, log_p[:, None], 0.0)
        intersection += tl.sum(tl.where(own, tl.exp(log_p)[:, None], 0.0), 0).to(tl.float64)
        predicted += tl.sum(p, 0).to(tl.float64)
        reference += tl.sum(tl.where(own, 1.0, 0.0), 0).to(tl.float64)
        log_likelihood += tl.sum(own_log_p, 0).to(tl.float64)
        if focal_gamma != 0:
            by = _power(_one_minus_exp(log_p), focal_gamma)
            own_log_p = tl.where(own, (by * log_p)[:, None], 0.0)
        focal += tl.sum(own_log_p, 0).to(tl.float64)
    sums += (sample * n_runs + run).to(tl.int64) * n_sums * n_classes + classes
    tl.store(sums, intersection, mask=is_class)
    tl.store(sums + n_classes, predicted, mask=is_class)
    tl.store(sums + 2 * n_classes, reference, mask=is_class)
    tl.store(sums + 3 * n_classes, log_likelihood, mask=is_class)
    tl.store(sums + 4 * n_classes, focal, mask=is_class)


@triton.jit(do_not_specialize=VARYING)
def _head_sums_backward_of_runs(
    rows,
    sample_stride,
    voxel_stride,
    channel_stride,
    weight,
    weight_stride,
    bias,
    scale,
    scale_stride,
    shift,
    shift_stride,
    labels,
    label_sample_stride,
    label_stride,
    n_voxels,
    n_channels,
    n_classes,
    n_runs,
    run_length,
    slopes,
    into,
    into_sample_stride,
    into_voxel_stride,
    into_channel_stride,
    of_weight,
    of_bias,
    sums_g,
    sums_gx,
    ignore_label: tl.constexpr,
    focal_gamma: tl.constexpr,
    n_sums: tl.constexpr,
    slope: tl.constexpr,
    unit: tl.constexpr,
    precision: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
    block_k: tl.constexpr,
):
    """A run of a sample, some channels."""
    voxel_stride *= unit
    into_voxel_stride *= unit
    weight_stride *= unit
    n_channels *= unit
    n_blocks_c = tl.cdiv(n_channels, block_c)
    first_channel = tl.program_id(0) % n_blocks_c * block_c
    channels = first_channel + tl.arange(0, block_c)
    run = tl.program_id(0) // n_blocks_c
    sample = tl.program_id(1)
    here = tl.arange(0, block_v)
    classes = tl.arange(0, block_k)
    is_class = classes < n_classes
    is_channel = channels < n_channels
    rows += sample.to(tl.int64) * sample_stride * unit
    labels += sample.to(tl.int64) * label_sample_stride
    into += sample.to(tl.int64) * into_sample_stride * unit
    if scale is not None:
        scale += sample * scale_stride
        shift += sample * shift_stride
        a = tl.load(scale + channels, mask=is_channel, other=0.0)
        b = tl.load(shift + channels, mask=is_channel, other=0.0)
    slopes += sample * n_sums * n_classes + classes
    of_intersection = tl.load(slopes, mask=is_class, other=0.0)[None, :]
    of_predicted = tl.load(slopes + n_classes, mask=is_class, other=0.0)[None, :]
    of_log_likelihood = tl.load(slopes + 3 * n_classes, mask=is_class, other=0.0)[None, :]
    of_focal = tl.load(slopes + 4 * n_classes, mask=is_class, other=0.0)[None, :]
    total = tl.zeros((block_k, block_c), tl.float32)
    bias_total = tl.zeros((block_k,), tl.float32)
    sum_g = tl.zeros((block_c,), tl.float32)
    sum_gx = tl.zeros((block_c,), tl.float32)
    first = run * run_length * block_v
    for start in range(first, min(first + run_length * block_v, n_voxels), block_v):
        is_voxel = start + here < n_voxels
        block = rows + tl.cast(start, tl.int64) * voxel_stride
        z = _logits(
            block,
            voxel_stride,
            channel_stride,
            weight,
            weight_stride,
            bias,
            scale,
            shift,
            n_channels,
            n_classes,
            is_voxel,
            slope,
            precision,
            block_v,
            block_c,
            block_k,
        )
        label = tl.load(labels + tl.cast(start + here, tl.int64) * label_stride, mask=is_voxel)
        p, own, log_p = _softmax(z, label, is_voxel, n_classes, ignore_label, block_k)
        # on a voxel's own log p
        chain = of_intersection * tl.exp(log_p)[:, None] + of_log_likelihood
        if focal_gamma == 0:
            chain += of_focal
        else:
            rest = _one_minus_exp(log_p)
            ratio = tl.where(rest > 0, log_p / tl.where(rest > 0, rest, 1.0), -1.0)
            by = _power(rest, focal_gamma) * (1 - focal_gamma * tl.exp(log_p) * ratio)
            chain += of_focal * by[:, None]
        chain = tl.where(own, chain, 0.0)
        g = p * of_predicted
        g += chain - p * (tl.sum(g, 1) + tl.sum(chain, 1))[:, None]
        bias_total += tl.sum(g, 0)
        is_value = is_voxel[:, None] & is_channel[None, :]
        x = tl.load(
            block + here[:, None] * voxel_stride + channels[None, :] * channel_stride,
            mask=is_value,
            other=0.0,
        )
        w = tl.load(
            weight + classes[:, None] * weight_stride + channels[None, :],
            mask=is_class[:, None] & is_channel[None, :],
            other=0.0,
        )
        g = g.to(w.dtype)
        back = tl.dot(g, w, input_precision=precision)
        features = x
        if scale is not None:
            before = x.to(tl.float32) * a[None, :] + b[None, :]
            features = activated(before, slope).to(x.dtype)
            back = before_activation(back, before, slope)
            sum_g += tl.sum(back, 0)
            sum_gx += tl.sum(back * x.to(tl.float32), 0)
            back *= a[None, :]
        total = tl.dot(tl.trans(g), features, total, input_precision=precision)
        tl.store(
            into
            + tl.cast(start + here, tl.int64)[:, None] * into_voxel_stride
            + tl.cast(channels, tl.int64)[None, :] * into_channel_stride,
            back.to(into.dtype.element_ty),
            mask=is_value,
        )
    run += sample * n_runs
    tl.store(
        of_weight
        + run.to(tl.int64) * n_classes * n_channels
        + classes[:, None] * n_channels
        + channels[None, :],
        total,
        mask=is_class[:, None] & is_channel[None, :],
    )
    # all that share these voxels found the same
    if first_channel == 0:
        tl.store(of_bias + run * n_classes + classes, bias_total, mask=is_class)
    if scale is not None:
        tl.store(sums_g + run * n_channels + channels, sum_g, mask=is_channel)
        tl.store(sums_gx + run * n_channels + channels, sum_gx, mask=is_channel)


@triton.jit
def _logits(
    rows,
    voxel_stride,
    channel_stride,
    weight,
    weight_stride,
    bias,
    scale,
    shift,
    n_channels,
    n_classes,
    is_voxel,
    slope: tl.constexpr,
    precision: tl.constexpr,
    block_v: tl.constexpr,
    block_c: tl.constexpr,
    block_k: tl.constexpr,
):
    """(voxels, classes) in float32."""
    here = tl.arange(0, block_v)
    classes = tl.arange(0, block_k)
    is_class = classes < n_classes
    z = tl.zeros((block_v, block_k), tl.float32)
    for start in range(0, n_channels, block_c):
        channels = start + tl.arange(0, block_c)
        is_channel = channels < n_channels
        x = tl.load(
            rows + here[:, None] * voxel_stride + channels[None, :] * channel_stride,
            mask=is_voxel[:, None] & is_channel[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + classes[None, :] * weight_stride + channels[:, None],
            mask=is_class[None, :] & is_channel[:, None],
            other=0.0,
        )
        features = x
        if scale is not None:
            a = tl.load(scale + channels, mask=is_channel, other=0.0)
            b = tl.load(shift + channels, mask=is_channel, other=0.0)
            features = activated(x.to(tl.float32) * a[None, :] + b[None, :], slope).to(x.dtype)
        z = tl.dot(features, w, z, input_precision=precision)
    if bias is not None:
        z += tl.load(bias + classes, mask=is_class, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _softmax(z, label, is_voxel, n_classes, ignore_label: tl.constexpr, block_k: tl.constexpr):
    """Probabilities, zero where nothing counts; each voxel's own class; log p of it."""
    classes = tl.arange(0, block_k)
    label = label.to(tl.int64)
    z = tl.where((classes < n_classes)[None, :], z, float("-inf"))
    z -= tl.max(z, 1)[:, None]
    p = tl.exp(z)
    total = tl.sum(p, 1)
    counts = is_voxel
    if ignore_label is not None:
        counts = counts & (label != ignore_label)
    p = tl.where(counts[:, None], p / total[:, None], 0.0)
    own = (label[:, None] == classes[None, :]) & (
        is_voxel[:, None] & (classes < n_classes)[None, :]
    )
    log_p = tl.sum(tl.where(own, z, 0.0), 1) - tl.log(total)
    # a logit of -inf (a class ruled out) must not become -inf x 0
    return p, own, tl.maximum(log_p, -3.4028234663852886e38)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, to its last bits where it is small."""
    near = tl.maximum(x, -0.25)
    series = 1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6)))
    series = -near * (1 + near / 2 * series)
    return tl.where(x > -0.25, series, 1 - tl.exp(x))


@triton.jit
def _power(x, exponent: tl.constexpr):
    """A positive power of x >= 0."""
    power = tl.exp2(exponent * tl.log2(tl.where(x > 0, x, 1.0)))
    return tl.where(x > 0, power, 0.0)
