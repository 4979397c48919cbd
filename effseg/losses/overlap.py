"""Overlap of prediction and reference, a class at a time, from sums over voxels."""

import torch
from torch import Tensor

from effseg.plans import LossConfig

NEAR = 1e-6
"""A miss below which its power goes on as a straight line: a power below 1 is infinitely steep at
0."""


def missed_overlaps(sums: dict[str, Tensor], config: LossConfig) -> Tensor:
    """The weighted sum of 1 - overlap over the overlap terms of a loss, (rows, classes).

    Overlap of a class is (2 I + s) / (2 (I + a (P - I) + b (R - I)) + s) with intersection I, sum
    of probabilities P, reference voxels R and smoothing s. It is Dice for a = b = 1/2 (Milletari et
    al. 2016, V-Net, arXiv:1606.04797, without its squares), Jaccard for 1, and Tversky in general
    (Salehi et al. 2017, arXiv:1706.05721). Squared Dice is V-Net's own, with the sum of squared
    probabilities for P. A power of 1 - overlap makes it focal (Abraham & Khan 2019,
    arXiv:1810.07842).

    Args:
        sums: by name, (rows, classes); a row is a sample, or all of a batch.
        config: weights, smoothing and power.
    """
    intersection, predicted, reference = (
        sums[name] for name in ("intersection", "predicted", "reference")
    )
    smooth = config.dice_smooth
    hit = 2 * intersection + smooth

    def missed(of: Tensor, false_positives: float, false_negatives: float) -> Tensor:
        false = false_positives * (of - intersection) + false_negatives * (reference - intersection)
        return _power(1 - hit / (2 * (intersection + false) + smooth), config.overlap_power)

    shares = (config.tversky_false_positives, config.tversky_false_negatives)
    total = torch.zeros_like(intersection)
    if config.dice_weight > 0:
        total = total + config.dice_weight * missed(predicted, 0.5, 0.5)
    if config.squared_dice_weight > 0:
        total = total + config.squared_dice_weight * missed(sums["squared"], 0.5, 0.5)
    if config.jaccard_weight > 0:
        total = total + config.jaccard_weight * missed(predicted, 1.0, 1.0)
    if config.tversky_weight > 0:
        total = total + config.tversky_weight * missed(predicted, *shares)
    return total


def _power(missed: Tensor, power: float) -> Tensor:
    if power == 1:
        return missed
    near = missed <= NEAR
    return torch.where(near, missed * NEAR ** (power - 1), torch.where(near, 1.0, missed) ** power)
