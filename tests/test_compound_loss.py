"""Every term of a loss: MONAI as the oracle, gradients, bytes, and the edges of the data."""

import monai.losses as monai
import pytest
import torch
from loss_of import loss_of
from pydantic import ValidationError
from torch import Tensor, nn

from effseg import plans
from effseg.errors import PlanError
from effseg.kernels import class_sums, class_tiles
from effseg.losses import CompoundLoss
from effseg.memory import measure_peak
from effseg.networks import defer_logits
from effseg.planner.check import check_plan
from effseg.plans import LossConfig, Plan, TrainingConfig

IGNORE = 255
CLASSES = 3
LOSSES = {
    **plans.LOSSES,
    "weighted_cross_entropy": {"dice_weight": 0.0, "class_weights": (0.2, 1.0, 3.0)},
    "focal_bce": {"dice_weight": 0.0, "focal_gamma": 1.5, "one_vs_rest": True},
    "squared_dice_of_sigmoids": plans.LOSSES["squared_dice"] | {"one_vs_rest": True},
}


def batch(space=(4, 3, 5), *, classes=CLASSES, ignored=0.0, dtype=torch.float64):
    logits = 2 * torch.randn(2, classes, *space, dtype=dtype)
    labels = torch.randint(0, max(2, classes), (2, *space), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < ignored] = IGNORE
    return logits.requires_grad_(), labels


def built(settings, *, classes=CLASSES) -> CompoundLoss:
    """In evaluation: a balance that learns would change from call to call."""
    return loss_of(n_channels=classes, ignore_label=IGNORE, **settings).eval()


def value_and_gradient(loss, logits, labels) -> tuple[Tensor, Tensor]:
    given = logits.detach().clone().requires_grad_()
    value = loss(given, labels)
    (gradient,) = torch.autograd.grad(value, given)
    return value.detach(), gradient


SOFT = {"softmax": True, "to_onehot_y": True, "include_background": False}
ORACLES = {
    "squared_dice": monai.DiceLoss(**SOFT, squared_pred=True, batch=True),
    "jaccard": monai.DiceLoss(**SOFT, jaccard=True, batch=True),
    # its smoothing is added to once the overlap, ours to twice
    "tversky": monai.TverskyLoss(
        **SOFT, alpha=0.3, beta=0.7, batch=True, smooth_nr=5e-6, smooth_dr=5e-6
    ),
    # its mean is over the classes too, all but one of which add nothing
    "focal": lambda z, y: 3 * monai.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=2)(z, y),
    "focal_bce": monai.FocalLoss(to_onehot_y=True, gamma=1.5),
    "squared_dice_of_sigmoids": monai.DiceLoss(
        sigmoid=True, to_onehot_y=True, include_background=False, squared_pred=True, batch=True
    ),
    "bce_jaccard": lambda z, y: (
        monai.DiceLoss(
            sigmoid=True, to_onehot_y=True, include_background=False, jaccard=True, batch=True
        )(z, y)
        + nn.functional.binary_cross_entropy_with_logits(
            z, nn.functional.one_hot(y[:, 0], 3).movedim(-1, 1).to(z)
        )
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_monai(name) -> None:
    logits, labels = batch(dtype=torch.float32)
    expected = value_and_gradient(lambda z, y: ORACLES[name](z, y[:, None].long()), logits, labels)
    got = value_and_gradient(built(LOSSES[name]), logits, labels)
    torch.testing.assert_close(got, expected, atol=2e-7, rtol=1e-5)


def test_one_channel_is_a_sigmoid() -> None:
    logits, labels = batch(classes=1, dtype=torch.float32)
    dice = monai.DiceLoss(sigmoid=True, batch=True)

    def oracle(z, y):
        target = y[:, None].to(z)
        return dice(z, target) + nn.functional.binary_cross_entropy_with_logits(z, target)

    expected = value_and_gradient(oracle, logits, labels)
    got = value_and_gradient(built({}, classes=1), logits, labels)
    torch.testing.assert_close(got, expected, atol=2e-7, rtol=1e-5)
    head, features = nn.Conv3d(4, 1, 1).double(), torch.randn(2, 4, 4, 3, 5).double()
    loss = built({"focal_gamma": 1.0, "squared_dice_weight": 1.0}, classes=1)
    of_deferred = value_and_gradient(lambda x, y: loss(defer_logits(head, x), y), features, labels)
    of_made = value_and_gradient(lambda x, y: loss(head(x), y), features, labels)
    torch.testing.assert_close(of_deferred, of_made, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_function(name, over_batch) -> None:
    settings = LOSSES[name] | {"dice_over_batch": over_batch}
    logits, labels = batch((2, 3, 2), ignored=0.2)
    loss = built(settings)
    if loss.balance is not None:
        loss.balance = None  # its weights are constants to the gradient
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), (logits,))


@pytest.mark.parametrize("name", LOSSES)
def test_deferred_logits_give_the_same_numbers(name) -> None:
    head, features = nn.Conv3d(4, CLASSES, 1).double(), torch.randn(2, 4, 4, 3, 5).double()
    _, labels = batch(ignored=0.3)
    loss = built(LOSSES[name])
    found = []
    for make in (defer_logits, lambda head, x: head(x)):
        head.zero_grad()
        x = features.clone().requires_grad_()
        value = loss(make(head, x), labels)
        value.backward()
        found.append([value.detach(), x.grad, *(p.grad.clone() for p in head.parameters())])
        assert x.grad.movedim(1, -1)[labels == IGNORE].abs().max() == 0
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_finite_where_there_is_little_to_learn_from(name) -> None:
    loss = built(LOSSES[name])
    logits, labels = batch(dtype=torch.float32)
    sure = 60.0 * nn.functional.one_hot(labels.long(), CLASSES).movedim(-1, 1).float() - 30
    ruled_out = logits.detach().clone()
    ruled_out[:, 2] = -torch.inf
    cases = {
        "no foreground": (logits, torch.zeros_like(labels)),
        "all ignored": (logits, torch.full_like(labels, IGNORE)),
        "one voxel": (logits[:1, :, :1, :1, :1], labels[:1, :1, :1, :1]),
        "right": (sure, labels),
        "wrong": (-sure, labels),
        "a class ruled out": (ruled_out, torch.zeros_like(labels)),
    }
    values = {}
    for case, given in cases.items():
        values[case], gradient = value_and_gradient(loss, *given)
        assert values[case].isfinite(), case
        assert gradient.isfinite().all(), case
        if case == "all ignored":
            assert values[case] == 0
            assert gradient.abs().max() == 0
    assert values["right"] < 1e-3 < 0.1 < values["wrong"]


@pytest.mark.parametrize("name", LOSSES)
def test_takes_features_gradient_and_a_few_numbers_a_class(name) -> None:
    n_classes, channels, side = 118, 32, 16
    head = nn.Conv3d(channels, n_classes, 1)
    features = torch.randn(2, channels, side, side, side, requires_grad=True)
    labels = torch.randint(0, n_classes, (2, side, side, side), dtype=torch.uint8)
    settings = LOSSES[name]
    if "class_weights" in settings:
        settings = settings | {"class_weights": (0.1, *(1.0,) * (n_classes - 1))}
    loss = built(settings, classes=n_classes).train()

    def step() -> None:
        loss(defer_logits(head, features), labels).backward()

    step()  # gradients are there from the second step on
    held = (
        2 * features.numel() * 4
        + labels.numel()
        + 2 * sum(p.numel() * 4 for p in head.parameters())
    )
    if loss.counting.edge_weight > 0:
        held += 2 * labels.numel()  # a byte of each pass
    sums = 2 * len(loss.counting.names) * n_classes * 8
    logits = 2 * n_classes * side**3 * 4
    features.grad = None
    report = measure_peak(step)
    assert held < report.peak_bytes <= held + 12 * sums + 2 * head.weight.nbytes < held + logits / 8
    assert report.saved_bytes <= 10 * sums


@pytest.mark.parametrize("name", ["squared_dice", "focal_bce"])
def test_scratch_is_a_few_tiles(name, monkeypatch: pytest.MonkeyPatch) -> None:
    n_classes, channels, n_voxels = 118, 32, 2**15
    rows, weight = torch.randn(1, n_voxels, channels), torch.randn(n_classes, channels)
    labels = torch.zeros(1, n_voxels, dtype=torch.uint8)
    counting = built(LOSSES[name], classes=n_classes).counting
    given = (rows, weight, None, None, None, 0.0, labels, IGNORE, counting.focal_gamma)
    more = (counting.one_vs_rest, counting.squared)
    slope = torch.ones(1, len(counting.names), n_classes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    held = rows.nbytes + weight.nbytes + labels.nbytes
    forward = measure_peak(lambda: class_sums.head_sums._init_fn(*given, *more))
    backward = measure_peak(lambda: class_sums.head_sums_backward._init_fn(*given, slope, *more))
    largest = max(forward.peak_bytes - held, backward.peak_bytes - held - rows.nbytes)
    assert largest < 8 * class_sums.TILE_BYTES["cpu"] < 4 * n_classes * n_voxels


def test_what_a_plain_loss_does_not_ask_for_is_not_counted() -> None:
    assert len(CompoundLoss().counting.names) == class_tiles.N_SUMS
    more = loss_of(squared_dice_weight=1.0, one_vs_rest=True).counting.names
    assert more[class_tiles.N_SUMS :] == ("squared", "rejected")


def test_focal_and_plain_overlap_by_hand() -> None:
    # four voxels of p = 1/2, one of them foreground: I = 1/2, P = 2, R = 1
    logits, labels = torch.zeros(1, 2, 4, dtype=torch.float64), torch.tensor([[1, 0, 0, 0]])
    tiny = {"dice_smooth": 1e-12}
    dice, jaccard, tversky = 1 / 3, 0.5 / 2.5, 0.5 / (0.5 + 0.3 * 1.5 + 0.7 * 0.5)
    expected = {"dice": 1 - dice, "jaccard": 1 - jaccard, "tversky": 1 - tversky}
    expected["focal_dice"] = (1 - dice) ** 0.75
    expected["focal_tversky"] = (1 - tversky) ** 0.75
    expected["squared_dice"] = 0.5  # the squares add up to 1
    for name, value in expected.items():
        assert float(loss_of(**LOSSES[name], **tiny)(logits, labels)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("settings", "n_channels", "words"),
    [
        ({"class_weights": (1.0, 2.0)}, 3, "2 class weights for 3 classes"),
        ({"one_vs_rest": True}, 1, "one_vs_rest with 1 channel, expected 2 or more"),
        ({"class_weights": "voxel_shares"}, 3, "expected numbers"),
        ({"balanced": True}, None, "give the loss n_channels"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_the_door(settings, n_channels, words) -> None:
    with pytest.raises(PlanError, match=words):
        loss_of(n_channels=n_channels, **settings)


def test_outputs_of_another_number_of_channels_are_refused() -> None:
    logits, labels = batch(classes=4)
    with pytest.raises(PlanError, match="logits of 4 channels for a loss of 3"):
        built({})(logits, labels)


def test_class_weights_come_of_the_voxel_shares(tiny_plan: Plan) -> None:
    loss = LossConfig(class_weights="voxel_shares")
    training = tiny_plan.training.model_copy(update={"loss": loss})
    plan = check_plan(tiny_plan.model_copy(update={"training": training}))
    shares = [label.voxel_share for label in plan.fingerprint.labels]
    weights = plan.training.loss.class_weights
    expected = [1 / (3 * share) for share in (1 - sum(shares), *shares)]
    assert weights == pytest.approx(expected, rel=1e-3)
    assert "voxel shares" in plan.reasons["class_weights"]


def test_a_plan_may_name_a_loss(tiny_plan: Plan) -> None:
    content = tiny_plan.model_dump(mode="json")
    content["training"]["loss"] = "focal"
    content["training"]["loss_schedule"] = [{"loss": "balanced", "from_epoch": 1}]
    training = Plan.model_validate(content).training
    assert training.loss == LossConfig(dice_weight=0.0, focal_gamma=2.0)
    assert training.losses[1].balanced
    with pytest.raises(ValidationError, match='loss "dicey"; expected settings, or one of dice_c'):
        TrainingConfig.model_validate({"loss": "dicey"})
