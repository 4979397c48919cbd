"""Losses against teachers' probabilities: torch's numbers, without classes x voxels beside them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from effseg.errors import GeometryError, PlanError
from effseg.kernels import class_sums, soft_sums
from effseg.losses import DistillationLoss, SoftLabels, add_teacher, build_loss
from effseg.losses.soft import soft_cross_entropy
from effseg.memory import measure_peak
from effseg.networks import NormActConv, defer_logits
from effseg.plans import LossConfig

SPACE = (4, 5, 6)


def hard_loss(ignore_label: int | None = None) -> nn.Module:
    return build_loss(LossConfig(), ignore_label=ignore_label, n_classes=3)


def head_of(kind: str, *, classes: int = 3, channels: int = 4) -> nn.Module:
    if kind == "conv":
        return nn.Conv3d(channels, classes, 1).double()
    head = NormActConv(
        channels, classes, norm=kind, act="leaky_relu", bias=True, memory="plain"
    ).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head


def targets_of(n: int, voxels: int, classes: int = 3) -> Tensor:
    return torch.rand(n, voxels, classes, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("kind", ["conv", "instance", "batch"])
@pytest.mark.parametrize("deferred", [False, True])
def test_equals_torch_with_all_its_gradients(kind, deferred, monkeypatch) -> None:
    monkeypatch.setattr("effseg.kernels.class_sums.TILE_BYTES", {"cpu": 1})  # tiles of 64 voxels
    head, temperature = head_of(kind), 1.7
    targets = targets_of(2, 120)
    q = targets.movedim(-1, 1).unflatten(-1, SPACE)
    found = []
    for make in (head, (lambda x: defer_logits(head, x)) if deferred else head):
        torch.manual_seed(1)
        features = torch.randn(2, 4, *SPACE, dtype=torch.float64, requires_grad=True)
        head.zero_grad()
        logits = make(features)
        if not found:
            value = cross_entropy(logits / temperature, q, reduction="sum")
            entropy = -(q * q.log()).sum()
            divergence = kl_div(log_softmax(logits / temperature, 1), q, reduction="sum")
            torch.testing.assert_close(value, divergence + entropy)
        else:
            value = soft_cross_entropy(logits, targets, temperature).sum()
        value.backward()
        found.append([value.detach(), features.grad, *(p.grad.clone() for p in head.parameters())])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["conv", "instance"])
def test_gradients_are_those_of_the_function(kind) -> None:
    head, targets = head_of(kind), targets_of(2, 8)
    labels = torch.randint(0, 3, (2, 2, 2, 2))
    loss = DistillationLoss(hard_loss(), weight=0.4, temperature=2.0)

    def run(features: Tensor) -> Tensor:
        return loss(defer_logits(head, features), SoftLabels(labels, targets))

    features = torch.randn(2, 4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, features)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(features), features, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_are_the_mean_of_the_teachers(dtype) -> None:
    logits = [4 * torch.randn(2, 3, *SPACE).to(dtype) for _ in range(5)]
    targets = torch.zeros(2, 120, 3, dtype=torch.float16)
    for one in logits:
        add_teacher(targets, one, temperature=2.0, share=1 / 5)
    expected = sum(softmax(one.float() / 2, 1) for one in logits) / 5
    got = targets.movedim(-1, 1).unflatten(-1, SPACE).float()
    assert (got - expected).abs().max() < 5 * 2.5e-4


def test_samples_may_come_one_after_the_other() -> None:
    loss = DistillationLoss(hard_loss(9), weight=0.3, temperature=3.0)
    logits, targets = torch.randn(3, 3, *SPACE), targets_of(3, 120)
    labels = torch.randint(0, 3, (3, *SPACE))
    labels[1] = 9  # one that nobody labelled
    soft = SoftLabels(labels, targets)
    whole = loss(logits, soft)
    rows = [loss.terms(logits[i, None], soft[i, None]) for i in range(3)]
    torch.testing.assert_close(loss.of_terms(torch.cat(rows)).float(), whole)
    hard = hard_loss(9)(logits, labels)
    entropy = cross_entropy(logits / 3, targets.movedim(-1, 1).unflatten(-1, SPACE).float())
    torch.testing.assert_close(whole, 0.7 * hard + 0.3 * 9 * entropy)


def test_nothing_of_classes_x_voxels_stands_beside_the_targets(monkeypatch) -> None:
    classes, voxels = 118, 32**3
    features = torch.randn(1, 4, 32, 32, 32).to(memory_format=torch.channels_last_3d)
    head = nn.Conv3d(4, classes, 1)
    targets = torch.zeros(1, voxels, classes, dtype=torch.float16)
    beside = features.nbytes + targets.nbytes

    def step() -> None:
        x = features.detach().requires_grad_()
        add_teacher(targets, defer_logits(head, x.detach()), temperature=2, share=1)
        soft_cross_entropy(defer_logits(head, x), targets, 2.0).sum().backward()

    assert measure_peak(step).peak_bytes < beside + 2 * features.nbytes

    # and inside the operators there are a few tiles
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    deferred = defer_logits(head, features)
    made = (deferred.rows.detach(), deferred.weight.detach(), None, None, None, 0.0)

    def operators() -> None:
        soft_sums.add_softened._init_fn(targets, *made, 2.0, 1.0)
        soft_sums.soft_sums._init_fn(*made, targets, 2.0)
        slope = torch.ones(1, dtype=torch.float64)
        soft_sums.soft_sums_backward._init_fn(*made, targets, 2.0, slope)

    tile = class_sums.TILE_BYTES["cpu"]
    sums = 2 * 32 * 4 * classes * (4 + 1)  # of weight and bias, one a strip
    assert measure_peak(operators).peak_bytes < beside + features.nbytes + sums + 8 * tile
    assert 8 * tile < 0.3 * 4 * classes * voxels


def test_misfits_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"targets \(2, 120, 4\) for logits \(2, 3, 4, 5, 6\)"):
        soft_cross_entropy(torch.randn(2, 3, *SPACE), targets_of(2, 120, 4), 1.0)
    for choice in ({"weight": 1.5, "temperature": 1.0}, {"weight": 0.5, "temperature": 0.0}):
        with pytest.raises(PlanError, match="expected 0 to 1, and above 0"):
            DistillationLoss(hard_loss(), **choice)
