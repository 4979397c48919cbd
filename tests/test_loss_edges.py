"""Weights by distance to the edge of a label: scipy as the oracle, the loss, then the bytes."""

import numpy as np
import pytest
import torch
from loss_of import loss_of
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from effseg.errors import GeometryError
from effseg.kernels import edges
from effseg.losses import CompoundLoss, DeepSupervisionLoss
from effseg.memory import measure_peak, trace_peak
from effseg.networks import defer_logits
from effseg.plans import LossConfig

IGNORE = 255
SPACING = (2.0, 1.0, 0.5)


def blobs(shape=(12, 15, 20), *, ignored=False) -> Tensor:
    labels = torch.zeros(2, *shape, dtype=torch.uint8)
    labels[0, 3:8, 4:11, 5:15] = 1
    labels[0, 5:9, 7:12, 9:18] = 2
    labels[1, :4, :5, :6] = 1
    if ignored:
        labels[1, 8:] = IGNORE
    return labels


def expected_closeness(label: np.ndarray, *, sigma_mm: float) -> np.ndarray:
    """By scipy's exact distances."""
    edge = np.zeros(label.shape, bool)
    for axis in range(label.ndim):
        one, other = (np.moveaxis(label, axis, 0)[part] for part in (slice(-1), slice(1, None)))
        differ = (one != other) & (one != IGNORE) & (other != IGNORE)
        along = np.moveaxis(edge, axis, 0)
        along[:-1] |= differ
        along[1:] |= differ
    distance = distance_transform_edt(~edge, sampling=SPACING)
    return 255 * np.exp(-(distance**2) / (2 * sigma_mm**2))


@pytest.mark.parametrize("planes_bytes", [1 << 21, 1])
@pytest.mark.parametrize("ignored", [False, True])
def test_equals_scipys_distances(ignored, planes_bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "PLANES_BYTES", planes_bytes)
    labels, sigma = blobs(ignored=ignored), 1.5
    sigmas = [sigma / length for length in SPACING]
    got = edges.edge_closeness(labels, ignore_label=IGNORE, sigmas=sigmas)
    assert got.dtype == torch.uint8
    for label, found in zip(labels.numpy(), got.numpy(), strict=True):
        expected = expected_closeness(label, sigma_mm=sigma)
        # rounded twice; beyond three sigma along an axis there is nothing
        assert np.abs(found - expected).max() <= 3
        assert (found[expected > 254] == 255).all()


def test_no_edge_is_no_closeness() -> None:
    labels = torch.full((1, 3, 4, 5), 2)
    assert edges.edge_closeness(labels, ignore_label=None, sigmas=[1.0] * 3).max() == 0


def weighed(**settings) -> CompoundLoss:
    config = LossConfig(**({"dice_weight": 0.0, "edge_weight": 4.0, "edge_mm": 1.5} | settings))
    return CompoundLoss(config, ignore_label=IGNORE, spacing=SPACING)


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("one_vs_rest", [False, True])
def test_cross_entropy_is_weighed_so(one_vs_rest, gamma) -> None:
    labels = blobs(ignored=True)
    logits = torch.randn(2, 3, *labels.shape[1:], dtype=torch.float64, requires_grad=True)
    loss = weighed(one_vs_rest=one_vs_rest, focal_gamma=gamma, class_weights=(0.5, 1.0, 2.0))
    close = loss.closeness(labels).double() / 255
    kept = labels != IGNORE
    target = nn.functional.one_hot(torch.where(kept, labels, 0).long(), 3).movedim(-1, 1).double()
    each = torch.tensor([0.5, 1.0, 2.0]).double().view(1, 3, 1, 1, 1)
    weights = ((1 + 4 * close) * kept)[:, None]
    if one_vs_rest:
        p = logits.sigmoid()
        entropy = (1 - p) ** gamma * p.log() * target + p**gamma * (1 - p).log() * (1 - target)
        expected = -(entropy * each * weights).sum() / (weights.sum() * 3.5)
    else:
        p = logits.softmax(1)
        entropy = (1 - p) ** gamma * p.log() * target
        expected = -(entropy * each * weights).sum() / (target * each * weights).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    value = loss(logits, labels)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], gradient)


def test_deferred_logits_give_the_same_numbers() -> None:
    labels = blobs()
    head, features = nn.Conv3d(4, 3, 1).double(), torch.randn(2, 4, *labels.shape[1:]).double()
    found = []
    for make in (defer_logits, lambda head, x: head(x)):
        x = features.clone().requires_grad_()
        value = weighed(balanced=False, dice_weight=1.0)(make(head, x), labels)
        value.backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_coarser_outputs_have_the_weights_of_the_voxels_they_keep() -> None:
    labels = blobs((12, 16, 20))
    outputs = [torch.randn(2, 3, 12, 16, 20), torch.randn(2, 3, 6, 8, 10)]
    loss = weighed()
    close = loss.closeness(labels)
    coarse = (slice(None), *(slice(None, None, 2),) * 3)
    parts = [
        loss.of_terms(loss.terms(outputs[0], labels)),
        loss.of_terms(loss.terms(outputs[1], labels[coarse], close[coarse])),
    ]
    expected = (2 * parts[0] + parts[1]) / 3
    got = DeepSupervisionLoss(loss)(outputs, labels)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_takes_two_bytes_a_voxel_and_the_trace_says_so() -> None:
    n_classes, channels, side = 118, 16, 24
    labels = torch.zeros(1, side, side, side, dtype=torch.uint8)
    labels[:, 5:9, 5:9, 5:9] = 1
    head, voxels = nn.Conv3d(channels, n_classes, 1), side**3

    class Deferred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, image: Tensor):
            return defer_logits(self.head, image)

    peaks = {}
    for weight in (0.0, 1.0):
        loss = loss_of(edge_weight=weight)
        traced = trace_peak(
            Deferred(),
            (1, channels, side, side, side),
            loss=loss,
            label_shape=labels.shape,
            label_dtype=torch.uint8,
            device="cpu",
        )
        image = torch.randn(1, channels, side, side, side)

        def step(loss=loss, image=image) -> None:
            loss(defer_logits(head, image), labels).backward()
            head.zero_grad()

        assert measure_peak(step).peak_bytes <= traced.peak_bytes + 4 * voxels
        peaks[weight] = traced.peak_bytes
    sums = 6 * n_classes * 8
    assert peaks[0.0] < peaks[1.0] <= peaks[0.0] + 2 * voxels + 8 * sums


def test_labels_of_other_axes_than_the_spacing_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"spacing along 3 axes"):
        weighed()(torch.randn(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8))
