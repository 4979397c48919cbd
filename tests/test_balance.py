"""The dynamic balanced loss: neither collapse falls, what it keeps, and rare voxels learnt."""

import numpy as np
import pytest
import torch
from loss_of import loss_of
from torch import Tensor, distributed, nn
from two_stages import two_stages

from effseg.losses import CompoundLoss, DeepSupervisionLoss
from effseg.networks import build_network
from effseg.training.rescue import Rescue
from effseg.training.step import SampleBySample, WholeBatch

ONLY = {"dice_weight": 0.0, "balanced": True}


def balanced(**settings) -> CompoundLoss:
    return loss_of(n_channels=2, **(ONLY | settings))


def constant(p: float, *, n_rare: int, n_voxels: int) -> tuple[Tensor, Tensor]:
    """Logits that call each voxel foreground with probability p, and labels."""
    labels = torch.zeros(1, n_voxels, dtype=torch.int64)
    labels[:, :n_rare] = 1
    logit = torch.tensor(p, dtype=torch.float64).logit()
    return torch.stack((torch.zeros(1, n_voxels), logit.expand(1, n_voxels)), 1), labels


@pytest.mark.parametrize("n_rare", [2, 50, 1000])
def test_neither_collapse_is_a_falling_loss(n_rare) -> None:
    n_voxels = 10_000
    share = n_rare / n_voxels

    def slope(loss: CompoundLoss, p: float) -> float:
        """Of the loss on the foreground's logit, the same everywhere."""
        logits, labels = constant(p, n_rare=n_rare, n_voxels=n_voxels)
        loss(logits.requires_grad_(), labels).backward()
        return float(logits.grad[0, 1].sum())

    for p in (1e-9, share / 100, share, share**0.5 / 1.5):
        assert slope(balanced(), p) < 0, p  # more foreground costs less
    for p in (1.5 * share**0.5, 0.5, 0.99, 1 - 1e-9):
        assert slope(balanced(), p) > 0, p
    # plain cross-entropy falls until nothing is foreground but by the prior
    assert slope(loss_of(dice_weight=0.0), 2 * share) > 0


def test_a_rare_class_counts_as_much_as_the_rest_and_a_false_voxel_as_a_missed_one() -> None:
    # 2 of 1000 voxels; both found with p = 1/2, and two of the others are called so with p = 1/2
    logits = torch.full((1, 2, 1000), -40.0, dtype=torch.float64)
    logits[0, 0, 4:] = 40.0
    logits[0, :, :4] = 0.0
    labels = torch.zeros(1, 1000, dtype=torch.int64)
    labels[0, :2] = 1
    # foreground counts as 2 voxels; background as its errors, 2 x 1/2, and the foreground's 2
    expected = (2 / 2 + 2 / 3) * np.log(2) / 2
    assert float(balanced()(logits, labels)) == pytest.approx(expected)


def test_shares_are_smoothed_over_steps_and_kept_by_checkpoints() -> None:
    loss = balanced(balance_smoothing=0.75)
    shares = []
    for n_rare in (10, 30):
        logits, labels = constant(0.5, n_rare=n_rare, n_voxels=100)
        loss(logits, labels)
        shares.append(n_rare / 100)
    expected = (0.75 * shares[0] + shares[1]) / 1.75
    kept = loss.balance.shares / loss.balance.seen
    torch.testing.assert_close(kept[0], torch.tensor([1 - expected, expected]).double())
    torch.testing.assert_close(kept[1], kept[0] / 2)  # half of each is missed
    again = balanced()
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.balance.shares, loss.balance.shares)
    before = again.balance.shares.clone()
    again.eval()(logits, labels)
    again.train()(logits, torch.full_like(labels, 0))
    assert not torch.equal(again.balance.shares, before)


def test_evaluation_and_batches_of_ignored_voxels_teach_nothing() -> None:
    loss = loss_of(n_channels=2, ignore_label=255, **ONLY)
    logits, labels = constant(0.5, n_rare=10, n_voxels=100)
    loss.eval()(logits, labels)
    assert loss.balance.seen == 0
    assert loss.train()(logits, torch.full_like(labels, 255)) == 0
    assert loss.balance.seen == 0


def test_a_batch_without_the_rare_class_weighs_as_the_steps_before() -> None:
    loss = balanced(balance_smoothing=0.9)
    loss(*constant(1e-6, n_rare=100, n_voxels=10_000))
    value = loss(*constant(0.01, n_rare=0, n_voxels=10_000))
    # 100 false voxels, in probabilities, against about 100 that there usually are
    assert 0.1 < float(value) < 1.0
    assert float(loss_of(dice_weight=0.0)(*constant(0.01, n_rare=0, n_voxels=10_000))) < 0.011


def test_a_sample_with_errors_weighs_more() -> None:
    labels = torch.zeros(2, 1000, dtype=torch.int64)
    labels[:, :50] = 1
    called = labels.clone()
    called[0, :1] = 0  # misses 1 of 50
    called[1, :49] = 0  # misses 49 of 50
    logits = 40 * (nn.functional.one_hot(called, 2).movedim(-1, 1).double() - 0.5)
    balanced()(logits.requires_grad_(), labels).backward()
    errors = [1 - (98 + 50) / (99 + 50), 1 - (2 + 50) / (51 + 50)]
    ratio = float(logits.grad[1, 1, 0] / logits.grad[0, 1, 0])
    assert ratio == pytest.approx((1 + errors[1]) / (1 + errors[0]))


def test_one_sample_after_the_other_gives_the_same_step() -> None:
    torch.manual_seed(0)
    network = build_network(two_stages("plain", out_channels=2)).double()
    image, label = torch.randn(3, 1, 8, 8, 8).double(), torch.zeros(3, 8, 8, 8, dtype=torch.uint8)
    label[1, 2:4, 2:4, 2:4] = 1
    found = []
    for kind in (WholeBatch, SampleBySample):
        network.zero_grad()
        loss = balanced()
        step = kind(network, loss)
        for _ in range(2):
            value = step.loss(image, label)
            step.backward(value)
        gradients = [parameter.grad.clone() for parameter in network.parameters()]
        found.append([value.detach(), loss.balance.shares.clone(), *gradients])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_a_step_with_several_outputs_counts_once() -> None:
    logits, labels = torch.randn(2, 2, 4, 4, 4), torch.randint(0, 2, (2, 4, 4, 4))
    one, deep = balanced(), balanced()
    one(logits, labels)
    DeepSupervisionLoss(deep)([logits, logits[..., ::2, ::2, ::2]], labels)
    assert torch.equal(one.balance.shares, deep.balance.shares)
    assert torch.equal(one.balance.seen, deep.balance.seen)


def test_a_step_that_is_done_again_counts_once() -> None:
    network = build_network(two_stages("shared", out_channels=2))
    image, label = torch.randn(2, 1, 8, 8, 8), torch.randint(0, 2, (2, 8, 8, 8))
    once, twice = balanced(), balanced()
    WholeBatch(network, once).loss(image, label)
    rescue = Rescue(network, twice, batch_size=2)
    refusals = [torch.OutOfMemoryError("no memory for 1 MiB")]

    def closure() -> None:
        rescue.step.loss(image, label)
        if refusals:
            raise refusals.pop()

    rescue.run(closure, epoch=0, step=0)
    assert rescue.events
    assert torch.equal(once.balance.seen, twice.balance.seen)
    torch.testing.assert_close(once.balance.shares, twice.balance.shares)


def test_processes_share_what_they_count(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [constant(p, n_rare=n, n_voxels=100) for p, n in ((0.3, 5), (0.6, 20))]
    whole = balanced()
    whole(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    reduced: list[Tensor] = []

    def add_the_others(counts: Tensor) -> None:
        reduced.append(counts.clone())
        if len(reduced) == 2:
            counts.add_(reduced[0])

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", add_the_others)
    for logits, labels in batches:
        loss = balanced()
        loss(logits, labels)
    torch.testing.assert_close(loss.balance.shares, whole.balance.shares)


SPACE = (24, 40, 40)


def rendered(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A small bright ball in noise; 0.05 % of the voxels are its."""
    axes = np.meshgrid(*(np.arange(n) for n in SPACE), indexing="ij")
    centre = [rng.uniform(5, n - 5) for n in SPACE]
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
    image = rng.normal(0, 0.3, SPACE) + np.clip(2.15 - distance, 0, 1)
    label = (distance < 1.65).astype(np.uint8)
    return torch.from_numpy(image.astype(np.float32))[None], torch.from_numpy(label)


def volumes(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    images, labels = zip(*(rendered(rng) for _ in range(n)), strict=True)
    return torch.stack(images), torch.stack(labels)


def trained_dice(loss: CompoundLoss, *, steps: int) -> tuple[float, float]:
    """Of a tiny network on volumes it has not seen: Dice, and the share it calls foreground."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU()),
        *(nn.Conv3d(8, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(8, 2, 1)),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    images, labels = volumes(12, seed=0)
    for _ in range(steps):
        chosen = torch.randperm(len(images))[:2]
        optimizer.zero_grad()
        loss(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    images, labels = volumes(6, seed=1)
    with torch.no_grad():
        found = torch.cat([network(image[None]).argmax(1) for image in images])
    hits = ((found == 1) & (labels == 1)).sum()
    return float(2 * hits / (found.sum() + labels.sum())), float(found.float().mean())


@pytest.mark.slow
def test_voxels_of_one_in_two_thousand_are_learnt() -> None:
    share = float(volumes(12, seed=0)[1].float().mean())
    assert share == pytest.approx(0.0005, abs=2e-5)
    dice, called = trained_dice(balanced(), steps=80)
    assert dice >= 0.6
    assert share / 3 < called < 3 * share
    plain, called = trained_dice(loss_of(dice_weight=0.0), steps=80)
    assert plain < 0.05
    assert called < share / 10
