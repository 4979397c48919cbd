"""Dice plus cross-entropy: MONAI and plain autograd as oracles, then the edges, then the bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_of import loss_of
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effseg.errors import DataError, GeometryError, PlanError
from effseg.kernels.class_tiles import Counting
from effseg.losses import DeepSupervisionLoss, build_loss, class_sums, voxel_chunks
from effseg.plans import LossConfig

IGNORE = 255
SETTINGS = [(b, o) for b in (False, True) for o in (False, True)]


def _batch(n=2, c=3, shape=(5, 4, 6), dtype=torch.float64, ignored=0.0):
    logits = torch.randn(n, c, *shape, dtype=dtype) * 2
    labels = torch.randint(0, c, (n, *shape), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < ignored] = IGNORE
    return logits.requires_grad_(), labels


def _plain(
    logits,
    labels,
    *,
    background,
    over_batch,
    ignore_label,
    weights=(1.0, 1.0),
    class_weights=None,
    gamma=0.0,
):
    """The same loss, written with masks and one-hot and left to autograd."""
    kept = labels != ignore_label if ignore_label is not None else torch.ones_like(labels).bool()
    safe = torch.where(kept, labels, 0).long()
    one_hot = nn.functional.one_hot(safe, logits.shape[1]).movedim(-1, 1) * kept[:, None]
    log_p = logits.log_softmax(1)
    p = log_p.exp() * kept[:, None]
    axes = tuple(range(2, logits.ndim))
    axes = (0, *axes) if over_batch else axes
    tp, pred, ref = ((t).sum(axes) for t in (p * one_hot, p, one_hot))
    each = torch.ones(logits.shape[1]) if class_weights is None else torch.tensor(class_weights)
    missed = each * (1 - (2 * tp + 1e-5) / (pred + ref + 1e-5))
    missed = missed if background else missed[..., 1:]
    weighed = one_hot * each.view(-1, *(1,) * (logits.ndim - 2))
    ce = -((1 - log_p.exp()) ** gamma * log_p * weighed).sum() / weighed.sum().clamp(min=1e-9)
    return weights[0] * missed.mean() + weights[1] * ce


def _number(value: Tensor) -> float:
    return float(value.detach())


def _value_and_gradient(loss, logits, labels) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize(("background", "over_batch"), SETTINGS)
def test_equals_monai(background, over_batch):
    from monai.losses import DiceCELoss as Oracle

    logits, labels = _batch(dtype=torch.float32)
    oracle = Oracle(softmax=True, to_onehot_y=True, include_background=background, batch=over_batch)
    expected, expected_gradient = _value_and_gradient(
        lambda z, y: oracle(z, y[:, None].long()), logits, labels
    )
    value, gradient = _value_and_gradient(
        loss_of(dice_background=background, dice_over_batch=over_batch), logits, labels
    )
    assert value.dtype == torch.float32
    assert abs(float(value - expected)) <= 1e-6
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("labels_type", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("background", "over_batch"), SETTINGS)
def test_equals_plain_autograd_with_ignored_voxels(background, over_batch, labels_type):
    logits, labels = _batch(n=3, c=4, ignored=0.3)
    loss = loss_of(
        dice_weight=0.7,
        cross_entropy_weight=1.3,
        dice_background=background,
        dice_over_batch=over_batch,
        ignore_label=IGNORE,
    )
    expected, expected_gradient = _value_and_gradient(
        lambda z, y: _plain(
            z,
            y,
            background=background,
            over_batch=over_batch,
            ignore_label=IGNORE,
            weights=(0.7, 1.3),
        ),
        logits,
        labels,
    )
    value, gradient = _value_and_gradient(loss, logits, labels.to(labels_type))
    assert abs(float(value - expected)) <= 1e-12
    assert (gradient - expected_gradient).abs().max() <= 1e-12
    assert gradient.movedim(1, -1)[labels == IGNORE].abs().max() == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("background", "over_batch"), SETTINGS)
def test_class_weights_and_focal_terms_equal_plain_autograd(background, over_batch, gamma):
    logits, labels = _batch(n=3, c=4, ignored=0.3)
    settings = {"background": background, "over_batch": over_batch, "ignore_label": IGNORE}
    weights = (0.5, 0.0, 3.0, 1.0)
    expected, expected_gradient = _value_and_gradient(
        lambda z, y: _plain(z, y, class_weights=weights, gamma=gamma, **settings), logits, labels
    )
    loss = loss_of(
        dice_background=background,
        dice_over_batch=over_batch,
        ignore_label=IGNORE,
        class_weights=weights,
        focal_gamma=gamma,
    )
    value, gradient = _value_and_gradient(loss, logits, labels)
    assert abs(float(value - expected)) <= 1e-12
    assert (gradient - expected_gradient).abs().max() <= 1e-12


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_a_sure_voxel_has_a_finite_focal_term(gamma):
    labels = torch.tensor([[0, 1]])
    logits = torch.tensor([[[200.0, 200.0], [-200.0, -200.0]]])
    loss = loss_of(dice_weight=0.0, focal_gamma=gamma)
    value, gradient = _value_and_gradient(loss, logits, labels)
    # one right and one wrong beyond doubt: (1 - 0)^gamma 400 over two voxels
    assert _number(value) == pytest.approx(200.0)
    torch.testing.assert_close(gradient, torch.tensor([[[0.0, 0.5], [0.0, -0.5]]]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_weights": (0.0, 0.0)}, "one above 0"),
        ({"class_weights": ()}, "one above 0"),
        ({"class_weights": (1.0, -1.0)}, "greater than or equal to 0"),
        ({"class_weights": (1.0, math.nan)}, "finite"),
        ({"focal_gamma": -1.0}, "greater than or equal to 0"),
        ({"focal_gamma": math.inf}, "finite"),
        ({"overlap_power": 0.0}, "greater than 0"),
        ({"dice_weight": 0.0, "cross_entropy_weight": 0.0}, "one term at least"),
        ({"dice_weight": -1.0}, "greater than or equal to 0"),
        ({"cross_entropy_weight": math.nan}, "finite"),
        (
            {"tversky_weight": 1, "tversky_false_positives": 0, "tversky_false_negatives": 0},
            "neither false nor missed",
        ),
        ({"balanced": True, "cross_entropy_weight": 0}, "cross_entropy_weight is 0"),
        ({"balanced": True, "class_weights": (1, 2)}, "leave class_weights out"),
        ({"balanced": True, "one_vs_rest": True}, "leave one_vs_rest out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        LossConfig(**options)


def test_as_many_class_weights_as_classes():
    logits, labels = _batch(c=3)
    with pytest.raises(PlanError, match="2 class weights for 3 classes"):
        loss_of(class_weights=(1.0, 2.0))(logits, labels)


def test_class_weights_move_with_the_module_and_are_not_learnt():
    loss = loss_of(class_weights=(1.0, 2.0))
    assert loss.state_dict() == {}
    assert loss.to("meta").class_weights.device.type == "meta"


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_gradcheck(ignored):
    logits, labels = _batch(c=3, shape=(2, 3, 2), ignored=ignored)
    ignore_label = IGNORE if ignored else None
    assert torch.autograd.gradcheck(
        lambda z: class_sums(z, labels, Counting(ignore_label, focal_gamma=1.5)), (logits,)
    )
    assert torch.autograd.gradcheck(
        lambda z: loss_of(ignore_label=ignore_label, dice_over_batch=False)(z, labels), (logits,)
    )


def test_sums_worked_by_hand():
    # two voxels, two classes: p = (3/4, 1/4) with label 0, then (1/2, 1/2) with label 1
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]], dtype=torch.float64)
    sums = class_sums(logits, torch.tensor([[0, 1]]), Counting(focal_gamma=2.0))
    log_p = [math.log(0.75), math.log(0.5)]
    focal = [0.25**2 * log_p[0], 0.5**2 * log_p[1]]
    expected = [[0.75, 0.5], [1.25, 0.75], [1.0, 1.0], log_p, focal]
    torch.testing.assert_close(sums[0], torch.tensor(expected, dtype=torch.float64))


def test_chunks_change_nothing(monkeypatch):
    logits, labels = _batch(n=2, c=3, ignored=0.2)
    loss = loss_of(ignore_label=IGNORE)
    whole = _value_and_gradient(loss, logits, labels)
    monkeypatch.setattr("effseg.losses.sums.SMALLEST_CHUNK", 21)
    assert len(list(voxel_chunks(2, 3, 120))) > 30
    chunked = _value_and_gradient(loss, logits, labels)
    for a, b in zip(whole, chunked, strict=True):
        assert (a - b).abs().max() <= 1e-12


@given(
    n=st.integers(1, 9), c=st.integers(2, 400), v=st.integers(1, 10**6), big=st.integers(0, 10**8)
)
@settings(max_examples=50, deadline=None)
def test_chunks_cover_every_voxel_once(n, c, v, big):
    for n_voxels in (v, v + big):
        ends = dict.fromkeys(range(n), 0)
        chunks = list(voxel_chunks(n, c, n_voxels))
        for sample, voxels in chunks:
            assert voxels.start == ends[sample] < voxels.stop
            ends[sample] = voxels.stop
        assert set(ends.values()) == {n_voxels}
        assert len(chunks) <= 34 + 2 * n


@given(seed=st.integers(0, 2**32 - 1), ignored=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=25, deadline=None)
def test_finite_bounded_and_blind_to_ignored_voxels(seed, ignored):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 3, 3, 3, generator=generator) * 30
    labels = torch.randint(0, 3, (2, 3, 3, 3), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE
    loss = loss_of(ignore_label=IGNORE)
    value, gradient = _value_and_gradient(loss, logits, labels)
    assert value.isfinite()
    assert value >= 0
    assert gradient.isfinite().all()
    disturbed = torch.where(labels[:, None] == IGNORE, torch.randn(logits.shape) * 100, logits)
    again, gradient_again = _value_and_gradient(loss, disturbed, labels)
    assert torch.equal(value, again)
    assert torch.equal(gradient, gradient_again)
    # a softmax does not see a constant added to all classes: the gradient sums to 0 over them
    assert gradient.sum(1).abs().max() <= 1e-6


def test_perfect_and_opposite_predictions():
    _, labels = _batch(c=2)
    sure = 40.0 * nn.functional.one_hot(labels.long(), 2).movedim(-1, 1).double()
    loss = loss_of()
    assert _number(loss(sure, labels)) == pytest.approx(0.0, abs=1e-12)
    assert _number(loss(-sure, labels)) == pytest.approx(41.0, abs=1e-6)


@pytest.mark.parametrize("over_batch", [False, True])
def test_all_ignored_is_zero_with_zero_gradient(over_batch):
    logits, labels = _batch()
    loss = loss_of(ignore_label=IGNORE, dice_over_batch=over_batch)
    value, gradient = _value_and_gradient(loss, logits, torch.full_like(labels, IGNORE))
    assert _number(value) == 0.0
    assert gradient.abs().max() == 0.0


def test_no_foreground_one_voxel_and_ruled_out_class_are_finite():
    logits, labels = _batch(dtype=torch.float32)
    value, gradient = _value_and_gradient(loss_of(), logits, torch.zeros_like(labels))
    assert value.isfinite()
    assert gradient.isfinite().all()
    one, label = torch.randn(1, 2, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.int64)
    value, gradient = _value_and_gradient(loss_of(), one, label)
    p = one.softmax(1)[0, 1].item()
    assert _number(value) == pytest.approx(1 - 2 * p / (p + 1) - math.log(p), rel=1e-4)
    assert gradient.isfinite().all()
    logits = logits.detach().clone()
    logits[:, 2] = -torch.inf
    value, gradient = _value_and_gradient(loss_of(), logits, torch.zeros_like(labels))
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("bad", "ignore_label"), [(3, None), (200, None), (3, IGNORE)])
def test_label_out_of_range_is_nan_with_zero_gradient(bad, ignore_label):
    logits, labels = _batch(c=3, ignored=0.2 if ignore_label else 0.0)
    labels[1, 2, 3, 4] = bad
    value, gradient = _value_and_gradient(loss_of(ignore_label=ignore_label), logits, labels)
    assert value.isnan()
    assert gradient.abs().max() == 0.0


def test_layout_of_logits_does_not_matter():
    logits, labels = _batch(dtype=torch.float32, ignored=0.1)
    loss = loss_of(ignore_label=IGNORE)
    value, gradient = _value_and_gradient(loss, logits, labels)
    last = logits.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    crooked = logits.detach().transpose(2, 4).contiguous().transpose(2, 4).requires_grad_()
    for other in (last, crooked):
        other_value = loss(other, labels)
        other_value.backward()
        torch.testing.assert_close(other_value, value)
        torch.testing.assert_close(other.grad, gradient)


def test_keeps_only_logits_and_labels_for_backward():
    logits, labels = _batch(n=2, c=8, shape=(16, 16, 16), dtype=torch.bfloat16, ignored=0.1)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = loss_of(ignore_label=IGNORE)(logits, labels)
    homes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert homes.pop(logits.untyped_storage().data_ptr()) == 2 * 8 * 16**3 * 2
    assert homes.pop(labels.untyped_storage().data_ptr()) == 2 * 16**3
    assert sum(homes.values()) <= 8192  # sums of a few numbers a class
    value.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_bfloat16_autocast_is_summed_in_float32():
    head = nn.Conv3d(4, 3, 1)
    features, (_, labels) = torch.randn(2, 4, 5, 4, 6), _batch(ignored=0.2)
    loss = loss_of(ignore_label=IGNORE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features)
        logits.retain_grad()
        value = loss(logits, labels)
    value.backward()
    assert logits.dtype == logits.grad.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    exact, gradient = _value_and_gradient(loss, logits.double(), labels)
    assert _number(value) == pytest.approx(_number(exact), rel=1e-6)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=2**-8, atol=1e-9)
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("deep", [False, True])
def test_traces_on_fake_tensors(deep):
    loss: nn.Module = loss_of(ignore_label=IGNORE)
    if deep:
        loss = DeepSupervisionLoss(loss)
    with FakeTensorMode():
        logits = torch.empty(2, 3, 64, 64, 64, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(2, 64, 64, 64, dtype=torch.uint8)
        value = loss([logits, logits[..., ::2, ::2, ::2]], labels) if deep else loss(logits, labels)
        value.backward()
        assert value.shape == ()
        assert logits.grad.shape == logits.shape


def test_inference_mode_gives_the_value_alone():
    logits, labels = _batch()
    with torch.inference_mode():
        assert torch.equal(loss_of()(logits, labels), loss_of()(logits.clone(), labels))


def test_deep_supervision_by_hand():
    loss = loss_of(ignore_label=IGNORE)
    _, labels = _batch(shape=(4, 8, 8), ignored=0.1)
    outputs = [
        torch.randn(2, 3, *shape, dtype=torch.float64)
        for shape in ((4, 8, 8), (4, 4, 4), (2, 2, 2))
    ]
    parts = [
        loss(outputs[0], labels),
        loss(outputs[1], labels[:, :, ::2, ::2]),
        loss(outputs[2], labels[:, ::2, ::4, ::4]),
    ]
    expected = sum(w * _number(p) for w, p in zip((4 / 7, 2 / 7, 1 / 7), parts, strict=True))
    assert _number(DeepSupervisionLoss(loss)(outputs, labels)) == pytest.approx(expected, rel=1e-12)
    alone = DeepSupervisionLoss(loss)(outputs[:1], labels)
    assert _number(alone) == pytest.approx(_number(parts[0]), rel=1e-12)


def test_deep_supervision_refuses_what_does_not_divide():
    _, labels = _batch(shape=(4, 6, 6))
    loss = DeepSupervisionLoss(loss_of())
    with pytest.raises(GeometryError, match=r"\(4, 6, 6\).*\(4, 4, 4\)"):
        loss([torch.randn(2, 3, 4, 4, 4)], labels)
    with pytest.raises(GeometryError, match="no outputs"):
        loss([], labels)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        ((2, 3, 4, 4, 4), (2, 1, 4, 4, 4), GeometryError, r"\(2, 1, 4, 4, 4\).*labels\[:, 0\]"),
        ((2, 3, 4, 4, 4), (2, 4, 4, 5), GeometryError, r"\(2, 3, 4, 4, 4\).*\(2, 4, 4, 5\)"),
        ((2, 3), (2,), GeometryError, r"\(N, C, \*S\)"),
        ((0, 3, 4, 4, 4), (0, 4, 4, 4), GeometryError, "no voxel"),
        ((2, 1, 4, 4, 4), (2, 1, 4, 4, 4), GeometryError, r"\(2, 1, 4, 4, 4\)"),
        ((2, 9, 4, 4, 4), (2, 4, 4, 4), PlanError, "ignore_label 7 is also a class"),
    ],
)
def test_shapes_are_refused_at_the_door(logits, labels, error, words):
    with pytest.raises(error, match=words):
        loss_of(ignore_label=7)(torch.randn(logits), torch.zeros(labels, dtype=torch.int64))


def test_types_are_refused_at_the_door():
    logits, labels = _batch()
    with pytest.raises(DataError, match=r"labels are torch\.float32"):
        loss_of()(logits, labels.float())
    with pytest.raises(DataError, match=r"logits are torch\.int64"):
        loss_of()(logits.detach().long(), labels)
    with pytest.raises(DataError, match=r"cannot hold the ignore label -1"):
        loss_of(ignore_label=-1)(logits, labels)  # 255 == -1 in uint8


def test_build_loss_follows_the_plan():
    config = LossConfig(
        dice_weight=0.5, cross_entropy_weight=2.0, dice_background=True, dice_over_batch=False
    )
    loss = build_loss(config, ignore_label=IGNORE, n_classes=3)
    logits, labels = _batch(ignored=0.2)
    expected = _plain(
        logits, labels, background=True, over_batch=False, ignore_label=IGNORE, weights=(0.5, 2.0)
    )
    assert _number(loss(logits, labels)) == pytest.approx(_number(expected), rel=1e-12)
    for ignore_label in (2, 0):
        with pytest.raises(PlanError, match="also a class"):
            build_loss(config, ignore_label=ignore_label, n_classes=3)


@pytest.mark.gpu
def test_deterministic_and_equal_on_cuda():
    logits, labels = _batch(n=2, c=5, shape=(32, 32, 32), dtype=torch.float32, ignored=0.1)
    loss = loss_of(ignore_label=IGNORE)
    here = _value_and_gradient(loss, logits, labels)
    torch.use_deterministic_algorithms(True)
    try:
        there = [_value_and_gradient(loss, logits.cuda(), labels.cuda()) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(there[0][1], there[1][1])
    assert torch.equal(there[0][0], there[1][0])
    torch.testing.assert_close(there[0][1].cpu(), here[1], atol=1e-8, rtol=1e-4)


def test_smoothing_makes_false_voxels_cost_where_there_is_nothing() -> None:
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    gradients = []
    for smooth in (1e-5, 10.0):
        logits = torch.zeros(1, 2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
        loss = loss_of(cross_entropy_weight=0.0, dice_smooth=smooth)(logits, labels)
        loss.backward()
        gradients.append(float(logits.grad[0, 1].sum()))
        # P = 32 of 64 voxels: the score is s / (P + s)
        assert loss.item() == pytest.approx(1 - smooth / (32 + smooth), abs=1e-6)
    assert gradients[1] > 1000 * gradients[0] > 0
