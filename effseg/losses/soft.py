"""Learning from another's probabilities beside the labels: distillation.

The soft loss is the cross-entropy of the student's softened probabilities against the teachers',
times the square of the temperature, which keeps its gradient as large as at 1 (Hinton, Vinyals and
Dean 2015, "Distilling the knowledge in a neural network", arXiv:1503.02531, section 2).
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from effseg.errors import GeometryError, PlanError
from effseg.kernels import DeferredLogits, refuse_second_derivative
from effseg.kernels.soft_sums import add_softened, soft_sums, soft_sums_backward
from effseg.kernels.tiles import to_rows
from effseg.losses.sums import through_statistics
from effseg.types import Logits

SECOND_DERIVATIVE = ("a loss against soft targets", "write it in torch's own operators")

TARGETS_DTYPE = torch.float16
"""Of soft targets: a probability of up to 1 is rounded by less than 2.5e-4 for each teacher."""


@dataclass(frozen=True)
class SoftLabels:
    """Labels of a batch, and what teachers say of it.

    Attributes:
        labels: (N, *S), as any loss takes them.
        targets: probabilities, (N, voxels, classes).
    """

    labels: Tensor
    targets: Tensor

    def __getitem__(self, index: Any) -> "SoftLabels":
        """Of some samples, as a tensor gives them; no index may reach beyond the first axis."""
        return SoftLabels(self.labels[index], self.targets[index])


class HardLoss(Protocol):
    """A loss of outputs and labels that reads each sample by itself first."""

    def __call__(self, outputs: Any, labels: Tensor, /) -> Tensor:
        """The loss of a batch, a scalar."""
        ...

    def terms(self, outputs: Any, labels: Tensor, /) -> Tensor:
        """All that the loss reads of each sample, one row a sample."""
        ...

    def of_terms(self, terms: Tensor, /) -> Tensor:
        """The loss of a batch from the `terms` of all its samples."""
        ...


class DistillationLoss(nn.Module):
    """(1 - `weight`) of a loss on labels and `weight` of one on teachers' probabilities.

    The soft one is the mean over all voxels, those without a label too: there teachers alone are
    learnt from. Of several outputs the finest is held against the teachers.

    Args:
        hard: on the labels.
        weight: 0 to 1.
        temperature: above 0, of student and teachers.

    Raises:
        PlanError: if one is out of range.
    """

    def __init__(self, hard: HardLoss, *, weight: float, temperature: float) -> None:
        super().__init__()
        if not (0 <= weight <= 1 and 0 < temperature < math.inf):
            raise PlanError(
                f"distillation weight {weight}, temperature {temperature}; expected 0 to 1, and "
                "above 0"
            )
        self.hard = hard
        self.weight = weight
        self.temperature = temperature
        self._hard_shape: torch.Size | None = None

    def forward(self, outputs: Any, labels: SoftLabels) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            outputs: logits (N, C, *S), made or deferred; or several of them, the finest first.
            labels: and targets.

        Raises:
            GeometryError: if the targets are not of the logits' shape; others as the hard loss.
        """
        loss = self.of_terms(self.terms(outputs, labels))
        return loss if _finest(outputs).dtype == torch.float64 else loss.float()

    def terms(self, outputs: Any, labels: SoftLabels) -> Float64[Tensor, "batch terms"]:
        """All that the loss reads of each sample, one row a sample."""
        rows = self.hard.terms(outputs, labels.labels)
        self._hard_shape = rows.shape[1:]
        soft = soft_cross_entropy(_finest(outputs), labels.targets, self.temperature)
        n_voxels = torch.full_like(soft, labels.targets.shape[1])
        return torch.cat((rows.flatten(1), torch.stack((soft, n_voxels), 1)), 1)

    def of_terms(self, terms: Float64[Tensor, "batch terms"]) -> Float64[Tensor, ""]:
        """The loss of a batch from the `terms` of all its samples, a scalar."""
        assert self._hard_shape is not None, "of_terms before terms"
        hard = self.hard.of_terms(terms[:, :-2].unflatten(1, self._hard_shape))
        soft = terms[:, -2].sum() / terms[:, -1].sum()
        value: Tensor = (1 - self.weight) * hard + self.weight * self.temperature**2 * soft
        return value


def soft_cross_entropy(
    logits: Logits | DeferredLogits,
    targets: Float[Tensor, "batch voxels classes"],
    temperature: float,
) -> Float64[Tensor, " batch"]:
    """The sum over a sample's voxels of -sum_c q_c log p_c, differentiable once on the logits.

    Args:
        logits: (N, C, *S); p is the softmax of them over the temperature.
        targets: q, which get no gradient.
        temperature: above 0.

    Raises:
        GeometryError: if the targets are not of the logits' shape.
    """
    n, classes, *space = logits.shape
    if targets.shape != (n, math.prod(space), classes):
        raise GeometryError(
            f"targets {tuple(targets.shape)} for logits {tuple(logits.shape)}; expected "
            f"{(n, math.prod(space), classes)}: samples, voxels, classes"
        )
    given = logits if isinstance(logits, DeferredLogits) else _as_rows(logits)
    norm = given.norm
    sums: Tensor = _SoftSums.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        given.rows,
        given.weight,
        given.bias,
        *((None,) * 4 if norm is None else (norm.scale, norm.shift, norm.mean, norm.rstd)),
        None if norm is None else norm.n_values,
        0.0 if norm is None else norm.slope,
        targets,
        temperature,
    )
    return sums


def add_teacher(
    targets: Tensor, logits: Logits | DeferredLogits, *, temperature: float, share: float
) -> None:
    """Add a share of a teacher's softened probabilities to soft targets, in place.

    Args:
        targets: (N, voxels, classes).
        logits: (N, classes, *S), made or deferred; nothing of them is kept for backward.
        temperature: above 0.
        share: of one, 1 over the number of teachers.
    """
    given = logits if isinstance(logits, DeferredLogits) else _as_rows(logits)
    norm = given.norm
    add_softened(
        targets,
        given.rows,
        given.weight,
        given.bias,
        None if norm is None else norm.scale,
        None if norm is None else norm.shift,
        0.0 if norm is None else norm.slope,
        temperature,
        share,
    )


class _SoftSums(torch.autograd.Function):
    """`soft_cross_entropy`; keeps features and targets as they came."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        n_values: int | None,
        slope: float,
        targets: Tensor,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, scale, shift, mean, rstd, targets)
        ctx.n_values, ctx.slope, ctx.temperature = n_values, slope, temperature
        sums: Tensor = soft_sums(rows, weight, bias, scale, shift, slope, targets, temperature)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(*SECOND_DERIVATIVE)
        rows, weight, bias, scale, shift, mean, rstd, targets = ctx.saved_tensors
        into, of_weight, of_bias, of_scale, of_shift = soft_sums_backward(
            rows, weight, bias, scale, shift, ctx.slope, targets, ctx.temperature, gradient
        )
        if ctx.n_values is not None:
            through_statistics(into, rows, (scale, mean, rstd), (of_scale, of_shift), ctx.n_values)
        return (
            into,
            of_weight.to(weight.dtype),
            None if bias is None else of_bias.to(bias.dtype),
            None if scale is None else of_scale,
            None if scale is None else of_shift,
            *(None,) * 6,
        )


def _as_rows(logits: Tensor) -> DeferredLogits:
    """Logits that exist as deferred ones: each class is its own feature."""
    weight = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    space = tuple(logits.shape[2:])
    return DeferredLogits(rows=to_rows(logits), weight=weight, bias=None, norm=None, space=space)


def _finest(outputs: Any) -> Tensor | DeferredLogits:
    finest: Tensor | DeferredLogits = outputs[0] if isinstance(outputs, list | tuple) else outputs
    return finest
