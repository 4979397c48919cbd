"""Four sums per class, from which overlap and likelihood losses are made, and their gradient.

Dice, Tversky, cross-entropy and their kin read a network's output only through sums over voxels.
So a loss takes two passes over chunks of voxels: `chunk_sums` adds the sums up; the loss is plain
arithmetic on them; `chunk_gradient` turns its slope on the sums into the gradient of the logits.
Neither softmax nor one-hot of the whole batch ever exists, and only logits and labels are kept from
forward to backward.

With p the softmax over classes and y the label of a voxel, the sums of class c are:

- intersection: of p_c over the voxels with y = c,
- predicted: of p_c over every voxel that is not ignored,
- reference: of 1 over the voxels with y = c,
- log_likelihood: of log p_c over the voxels with y = c.

Every step is deterministic on CUDA too: comparisons and reductions, no scatter, no NLLLoss.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Float64, Integer
from torch import Tensor

from effseg.types import Logits

Labels: TypeAlias = Integer[Tensor, " batch *space"]
"""A class, or the ignore label, for each voxel; no channel axis."""

N_SUMS = 4
CHUNKS = 32
SMALLEST_CHUNK = 2**18


def class_sums(
    logits: Logits, labels: Labels, *, ignore_label: int | None
) -> Float64[Tensor, "batch 4 classes"]:
    """The four sums of each class and sample, differentiable once on the logits.

    Args:
        logits: (N, C, *S); any floating type, summed in float32 (float64 logits in float64).
        labels: (N, *S); any integer type.
        ignore_label: voxels with this label count nowhere and get no gradient.

    Returns:
        (N, 4, C): intersection, predicted, reference, log_likelihood. All zero where every voxel
        is ignored. A label that is neither a class nor ignored counts as predicted alone.
    """
    # torch leaves apply untyped
    sums: Tensor = _ClassSums.apply(logits, labels.flatten(1), ignore_label)  # type: ignore[no-untyped-call]
    return sums


def voxel_chunks(n_samples: int, n_classes: int, n_voxels: int) -> Iterator[tuple[int, slice]]:
    """Sample and voxels of each chunk: a 32nd of all logits, or 2^18 of them where that is more.

    The share bounds the temporaries and the number of kernels launched; the floor is a chunk that
    stays in a core's cache.
    """
    size = max(SMALLEST_CHUNK, n_samples * n_classes * n_voxels // CHUNKS)
    step = max(1, size // n_classes)
    for sample in range(n_samples):
        for start in range(0, n_voxels, step):
            yield sample, slice(start, min(start + step, n_voxels))


def chunk_sums(
    logits: Float[Tensor, "classes voxels"],
    labels: Integer[Tensor, " voxels"],
    *,
    ignore_label: int | None,
) -> Float64[Tensor, "4 classes"]:
    """The four sums of some voxels of one sample: the first pass."""
    wide = _wide(logits)
    own = _one_hot(wide, labels)
    # a logit of -inf (a class ruled out) must not become -inf x 0 below
    scratch = torch.log_softmax(wide, dim=0).clamp_(min=torch.finfo(wide.dtype).min)
    log_likelihood = (scratch * own).sum(1)
    scratch.exp_()
    intersection = (scratch * own).sum(1)
    if ignore_label is not None:
        scratch.mul_(labels != ignore_label)
    predicted = scratch.sum(1)
    reference = own.sum(1)
    # chunks add up without drift, and counts stay exact, in float64
    return torch.stack([s.double() for s in (intersection, predicted, reference, log_likelihood)])


def chunk_gradient(
    logits: Float[Tensor, "classes voxels"],
    labels: Integer[Tensor, " voxels"],
    slope: Float[Tensor, "4 classes"],
    *,
    ignore_label: int | None,
) -> Float[Tensor, "classes voxels"]:
    """The gradient of the logits of some voxels of one sample: the second pass.

    With q_c = p_c dL/dp_c, the chain through the softmax is dL/dz_c = q_c - p_c sum_k q_k, and a
    log likelihood adds its slope to q of the voxel's own class.

    Args:
        logits: as in the first pass.
        labels: as in the first pass.
        slope: of the loss on each of the four sums; that of `reference` is not used.
        ignore_label: as in the first pass.

    Returns:
        dL/dlogits in float32 (float64 for float64 logits); zero on ignored voxels.
    """
    wide = _wide(logits)
    own = _one_hot(wide, labels)
    probabilities = torch.softmax(wide, dim=0)
    intersection, predicted, _, log_likelihood = slope.to(wide.dtype)[..., None].unbind()
    gradient = torch.addcmul(predicted, own, intersection).mul_(probabilities)
    gradient.addcmul_(own, log_likelihood)
    gradient.sub_(probabilities.mul_(gradient.sum(0)))
    if ignore_label is not None:
        gradient.mul_(labels != ignore_label)
    return gradient


class _ClassSums(torch.autograd.Function):
    """`class_sums` over chunks; keeps the logits and the labels as they came."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_label: int | None) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_label = ignore_label
        flat = logits.flatten(2)
        sums = torch.zeros(
            (logits.shape[0], N_SUMS, logits.shape[1]), dtype=torch.float64, device=logits.device
        )
        for sample, voxels in voxel_chunks(*flat.shape):
            sums[sample] += chunk_sums(
                flat[sample, :, voxels], labels[sample, voxels], ignore_label=ignore_label
            )
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        flat = logits.flatten(2)
        gradient = torch.empty_like(flat)
        for sample, voxels in voxel_chunks(*flat.shape):
            gradient[sample, :, voxels] = chunk_gradient(
                flat[sample, :, voxels],
                labels[sample, voxels],
                slope[sample],
                ignore_label=ctx.ignore_label,
            )
        return gradient.view(logits.shape), None, None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    classes = torch.arange(logits.shape[0], device=logits.device)[:, None]
    return (labels == classes).to(logits.dtype)
