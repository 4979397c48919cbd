"""Losses of logits that are never made in full: the same numbers, and what they take."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from loss_of import loss_of
from torch import Tensor, nn

from effseg.errors import GeometryError, PlanError
from effseg.kernels import class_sums, class_tiles, tiles
from effseg.losses import DeepSupervisionLoss
from effseg.memory import measure_peak, trace_peak
from effseg.networks import DenseUNet, NormActConv, defer_logits
from effseg.planner.step import PlannedTraining
from effseg.plans import LossConfig, NetworkConfig, Plan
from effseg.training.module import SegmentationModule

IGNORE = 255
SPACE = (5, 6, 7)
CLASSES = 4
WEIGHTS = (0.5, 2.0, 1.0, 0.25)
SETTINGS = [(b, o) for b in (False, True) for o in (False, True)]


def conv_head(dtype=torch.float64, channels=3, classes=CLASSES) -> nn.Conv3d:
    return nn.Conv3d(channels, classes, 1).to(dtype)


def norm_head(norm="instance", act="leaky_relu", *, train=True, bias=True) -> NormActConv:
    head = NormActConv(3, CLASSES, norm=norm, act=act, bias=bias, memory="plain").double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    if norm == "batch":
        head.norm.running_mean.fill_(0.3)
        head.norm.running_var.fill_(1.7)
    return head.train(train)


HEADS = {
    "conv": conv_head,
    "conv without bias": lambda: nn.Conv3d(3, CLASSES, 1, bias=False).double(),
    "conv in two axes": lambda: nn.Conv2d(3, CLASSES, 1).double(),
    "instance": norm_head,
    "batch": partial(norm_head, "batch", "relu"),
    "batch without bias": partial(norm_head, "batch", bias=False),
    "batch in eval mode": partial(norm_head, "batch", train=False),
}

LAYOUTS = {
    "channels first": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "crooked": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
}


def batch(space=SPACE, *, dtype=torch.float64, channels=3, classes=CLASSES, ignored=0.0):
    features = torch.randn(2, channels, *space, dtype=dtype)
    labels = torch.randint(0, classes, (2, *space), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < ignored] = IGNORE
    return features, labels


def results(make, loss, head, features, labels) -> list[Tensor]:
    """Value, gradients of features and parameters, buffers after one step."""
    head.zero_grad()
    before = [buffer.clone() for buffer in head.buffers()]
    features = features.detach().clone().requires_grad_()
    value = loss(make(head, features), labels)
    value.backward()
    gradients = [parameter.grad.clone() for parameter in head.parameters()]
    after = [buffer.double().clone() for buffer in head.buffers()]
    for buffer, old in zip(head.buffers(), before, strict=True):
        buffer.copy_(old)
    return [value.detach(), features.grad, *gradients, *after]


def made(head, features) -> Tensor:
    return head(features)


def assert_same(got, expected, *, tolerance) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance


def monai(*, background, over_batch, weights):
    """MONAI's loss over the voxels that are not ignored."""
    from monai.losses import DiceLoss

    weight = None if weights is None else torch.tensor(weights)
    dice_weight = weight if background or weight is None else weight[1:]
    dice = DiceLoss(
        softmax=True,
        to_onehot_y=True,
        include_background=background,
        batch=True,
        weight=dice_weight,
    )

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        rows, kept = logits.movedim(1, -1), labels != IGNORE
        groups = [...] if over_batch else range(len(labels))
        parts = [
            dice(rows[at][kept[at]].t()[None], labels[at][kept[at]].long()[None, None])
            for at in groups
        ]
        entropy = nn.functional.cross_entropy(rows[kept], labels[kept].long(), weight)
        return sum(parts) / len(parts) + entropy

    return loss


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("background", "over_batch"), SETTINGS)
def test_equals_a_convolution_and_monai(background, over_batch, weights) -> None:
    from monai.losses import DiceCELoss as Oracle

    oracle = Oracle(
        softmax=True,
        to_onehot_y=True,
        include_background=background,
        batch=over_batch,
        weight=None if weights is None else torch.tensor(weights),
    )
    loss = loss_of(dice_background=background, dice_over_batch=over_batch, class_weights=weights)
    head, (features, labels) = conv_head(torch.float32), batch(dtype=torch.float32)
    expected = results(made, lambda z, y: oracle(z, y[:, None].long()), head, features, labels)
    got = results(defer_logits, loss, head, features, labels)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_same(got, expected, tolerance=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("background", "over_batch"), SETTINGS)
def test_equals_monai_over_what_is_not_ignored(background, over_batch, weights) -> None:
    settings = {"background": background, "over_batch": over_batch, "weights": weights}
    loss = loss_of(
        dice_background=background,
        dice_over_batch=over_batch,
        class_weights=weights,
        ignore_label=IGNORE,
    )
    head, (features, labels) = conv_head(torch.float32), batch(dtype=torch.float32, ignored=0.4)
    expected = results(made, monai(**settings), head, features, labels)
    got = results(defer_logits, loss, head, features, labels)
    assert_same(got, expected, tolerance=1e-6)
    assert got[1].movedim(1, -1)[labels == IGNORE].abs().max() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"focal_gamma": 2.0, "class_weights": WEIGHTS, "dice_over_batch": False},
        {"focal_gamma": 0.5, "ignore_label": IGNORE, "dice_background": True},
    ],
    ids=["plain", "weighed and focal", "ignoring and focal"],
)
def test_equals_the_loss_of_logits_that_exist(head, options, layout) -> None:
    head, loss = HEADS[head](), loss_of(**options)
    space = SPACE[: 2 if isinstance(head, nn.Conv2d) else 3]
    features, labels = batch(space, ignored=0.3 if "ignore_label" in options else 0.0)
    features = LAYOUTS[layout](features)
    expected = results(made, loss, head, features, labels)
    assert_same(results(defer_logits, loss, head, features, labels), expected, tolerance=1e-12)


@pytest.mark.parametrize("labels_type", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(labels_type) -> None:
    head, (features, labels) = conv_head(), batch()
    expected = results(defer_logits, loss_of(), head, features, labels)
    got = results(defer_logits, loss_of(), head, features, labels.to(labels_type))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_function(head) -> None:
    head = HEADS[head]()
    space = (2, 3, 2)[: 2 if isinstance(head, nn.Conv2d) else 3]
    features, labels = batch(space, ignored=0.2)
    loss = loss_of(ignore_label=IGNORE, focal_gamma=1.5, dice_over_batch=False)
    names = [name for name, _ in head.named_parameters()]

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return loss(defer_logits(self.head, x), labels)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = {f"head.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Run(), given, (x,))

    parameters = [p.detach().clone().requires_grad_() for p in head.parameters()]
    assert torch.autograd.gradcheck(run, (features.requires_grad_(), *parameters))


def test_tiles_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, loss = norm_head("batch"), loss_of(ignore_label=IGNORE, focal_gamma=1.0)
    features, labels = batch((9, 10, 11), ignored=0.2)
    one = results(defer_logits, loss, head, features, labels)
    monkeypatch.setattr(class_sums, "TILE_BYTES", {"cpu": 1, "cuda": 1})  # the floor of 64 voxels
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(tiles, "SHARE", 1)
    monkeypatch.setattr(tiles, "STRIPS", 6)
    strips = tiles.strips_of([torch.empty(2, 990, 3)], length=64)
    assert [len(strip) for strip in strips] == [5, 5, 6, 5, 5, 6]
    assert_same(results(defer_logits, loss, head, features, labels), one, tolerance=1e-12)


def test_a_label_that_is_no_class_is_nan_with_zero_gradient() -> None:
    head, (features, labels) = conv_head(), batch()
    labels[1, 2, 3, 4] = 200
    value, *gradients = results(defer_logits, loss_of(), head, features, labels)
    assert value.isnan()
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_all_ignored_is_zero_with_zero_gradient() -> None:
    head, (features, labels) = norm_head(), batch()
    loss = loss_of(ignore_label=IGNORE, class_weights=WEIGHTS, focal_gamma=2.0)
    labels.fill_(IGNORE)
    value, *gradients = results(defer_logits, loss, head, features, labels)
    assert float(value) == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["conv", "instance"])
def test_autocast_computes_low_and_sums_in_float32(head, dtype) -> None:
    head, (features, labels) = HEADS[head]().float(), batch(dtype=torch.float32, ignored=0.2)
    loss = loss_of(ignore_label=IGNORE, focal_gamma=1.0)
    exact = results(defer_logits, loss, head, features, labels)

    def low(head, features):
        with torch.autocast("cpu", dtype=dtype):
            deferred = defer_logits(head, features)
            assert deferred.dtype == deferred.weight.dtype == dtype
            return deferred

    def low_loss(logits, labels):
        with torch.autocast("cpu", dtype=dtype):
            return loss(logits, labels)

    got = results(low, low_loss, head, features, labels)
    assert all(tensor.dtype == torch.float32 for tensor in got)
    for a, b in zip(got, exact, strict=True):
        # here and there a feature falls on the other side of the activation's bend
        assert (a - b).norm() <= 0.1 * b.norm()
    # backward within autocast is as outside
    features = features.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        (again,) = torch.autograd.grad(low_loss(low(head, features), labels), features)
    assert torch.equal(again, got[1])


@pytest.mark.parametrize("deferred", [False, True])
def test_a_second_derivative_is_refused(deferred) -> None:
    head, (features, labels) = conv_head(), batch()
    features.requires_grad_()
    logits = defer_logits(head, features) if deferred else head(features)
    with pytest.raises(RuntimeError, match=r"no second derivative .* torch's own operators"):
        torch.autograd.grad(loss_of()(logits, labels), features, create_graph=True)


def test_only_1x1_convolutions_are_heads() -> None:
    features, _ = batch()
    for conv in (
        nn.Conv3d(3, 2, 3, padding=1),
        nn.Conv3d(3, 2, 1, stride=2),
        nn.Conv3d(3, 3, 1, groups=3),
        nn.Conv3d(3, 2, 1, padding=1),
    ):
        with pytest.raises(PlanError, match="expected a 1x1 convolution"):
            defer_logits(conv.double(), features)


def test_shapes_are_refused_as_those_of_logits() -> None:
    head, (features, labels) = conv_head(), batch()
    with pytest.raises(GeometryError, match=r"logits \(2, 4, 5, 6, 7\) and labels \(2, 5, 6, 6\)"):
        loss_of()(defer_logits(head, features), labels[..., 1:])


# torch's own compiler instantiates the function that it warns against instantiating
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("head", ["conv", "instance", "batch"])
def test_compiles_without_a_break(head) -> None:
    head, (features, labels) = HEADS[head](), batch()
    loss = loss_of(class_weights=WEIGHTS, focal_gamma=2.0, ignore_label=IGNORE)
    expected = results(lambda head, x: x, partial(_whole, head, loss), head, features, labels)
    torch._dynamo.reset()
    compiled = torch.compile(_whole, fullgraph=True, backend="aot_eager")
    got = results(lambda head, x: x, partial(compiled, head, loss), head, features, labels)
    assert_same(got, expected, tolerance=1e-12)


def _whole(head, loss, features, labels) -> Tensor:
    return loss(defer_logits(head, features), labels)


class Deferred(nn.Module):
    """A network of a convolution, and a head that is left to the loss."""

    def __init__(self, head: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, channels, 1)
        self.head = head

    def forward(self, image: Tensor):
        return defer_logits(self.head, self.stem(image))


class ForLoss(nn.Module):
    """A network as training runs it."""

    def __init__(self, network: DenseUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor):
        return self.network.for_loss(image)


def config(**changes) -> NetworkConfig:
    given = {
        "in_channels": 1,
        "out_channels": CLASSES,
        "stem_channels": 8,
        "growth_rate": 4,
        "encoder_layers": (1, 1, 1),
        "decoder_layers": (1, 1),
        "strides": ((1, 1, 1), (2, 2, 2), (1, 2, 2)),
        "kernels": ((3, 3, 3),) * 3,
        "deep_supervision": True,
    }
    return NetworkConfig(**(given | changes))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("network", "deep"),
    [
        (lambda: Deferred(nn.Conv3d(6, 20, 1), 6), False),
        (lambda: Deferred(NormActConv(6, 20, norm="batch", bias=True), 6), False),
        (lambda: ForLoss(DenseUNet(config())), True),
    ],
    ids=["conv", "norm", "DenseUNet"],
)
def test_traced_equals_measured_to_the_byte(network, deep, autocast) -> None:
    network, shape = network(), (2, 1, 8, 16, 16)
    loss: nn.Module = loss_of(ignore_label=IGNORE, focal_gamma=1.0)
    loss = DeepSupervisionLoss(loss) if deep else loss
    image, labels = torch.randn(shape), torch.zeros(2, 8, 16, 16, dtype=torch.uint8)

    def step() -> None:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            value = loss(network(image), labels)
        value.backward()

    traced = trace_peak(
        network,
        shape,
        loss=loss,
        label_shape=labels.shape,
        label_dtype=labels.dtype,
        autocast=autocast,
        device="cpu",
    )
    assert replace(traced, device_bytes=None) == measure_peak(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_features_gradient_and_a_few_numbers_a_class(dtype) -> None:
    n_classes, channels, side = 118, 32, 16
    head = nn.Conv3d(channels, n_classes, 1).to(dtype)
    features, labels = batch((side,) * 3, dtype=dtype, channels=channels, classes=n_classes)
    features.requires_grad_()
    loss = loss_of(ignore_label=IGNORE)

    def step() -> None:
        loss(defer_logits(head, features), labels).backward()

    report = measure_peak(step)
    held = 2 * features.numel() * dtype.itemsize + labels.numel()
    held += sum(p.numel() * p.element_size() for p in head.parameters())
    sums = 2 * class_tiles.N_SUMS * n_classes * 8
    weights = 4 * (n_classes * (channels + 1)) + dtype.itemsize * n_classes * (channels + 1)
    logits = 2 * n_classes * side**3 * dtype.itemsize
    assert held < report.peak_bytes <= held + 8 * sums + weights < held + logits / 8
    # two sums of the loss, and what backward starts from: nothing of a voxel's size but features
    assert report.saved_bytes <= 8 * sums


@pytest.mark.parametrize("n_classes", [3, 118])
@pytest.mark.parametrize("normed", [False, True])
def test_scratch_is_a_few_tiles(n_classes, normed, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, n_voxels = 32, 2**16
    rows, weight = torch.randn(1, n_voxels, channels), torch.randn(n_classes, channels)
    bias, labels = torch.randn(n_classes), torch.zeros(1, n_voxels, dtype=torch.uint8)
    fold = (torch.ones(1, channels), torch.zeros(1, channels)) if normed else (None, None)
    given = (rows, weight, bias, *fold, 0.01, labels, IGNORE, 1.0)
    slope = torch.ones(1, class_tiles.N_SUMS, n_classes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    voxels = class_sums.class_tile_length(rows, n_classes)
    assert 4 * voxels * max(n_classes, channels) <= class_sums.TILE_BYTES["cpu"]
    held = rows.nbytes + weight.nbytes + bias.nbytes + labels.nbytes
    # label, log p and five sums' values in two types; a class has a logit and a probability
    of_voxel = 96 + 2 * 4 * n_classes
    few = 64 * class_tiles.N_SUMS * n_classes * 8
    of_strips = tiles.STRIPS * (weight.nbytes + 4 * n_classes + 8 * channels)

    forward = measure_peak(lambda: class_sums.head_sums._init_fn(*given)).peak_bytes - held
    assert forward <= voxels * (of_voxel + 4 * channels * normed) + few

    run = class_sums.head_sums_backward._init_fn
    backward = measure_peak(lambda: run(*given, slope)).peak_bytes - held - rows.nbytes
    features = 4 * channels * (3 if normed else 1)
    assert backward <= voxels * (of_voxel + features) + 3 * weight.nbytes + few + of_strips
    assert max(forward, backward) < 4 * class_sums.TILE_BYTES["cpu"]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_training_step_is_the_same_in_each_memory_mode(norm) -> None:
    image, labels = torch.randn(2, 1, 4, 8, 8).double(), batch((4, 8, 8))[1]
    networks = [DenseUNet(config(memory=mode, norm=norm)).double() for mode in ("shared", "plain")]
    networks[1].load_state_dict(networks[0].state_dict())
    loss = DeepSupervisionLoss(loss_of())
    values = []
    for network in networks:
        value = loss(network.for_loss(image), labels)
        value.backward()
        values.append(value.detach())
    assert (values[0] - values[1]).abs() <= 1e-12
    for shared, plain in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(shared.grad, plain.grad, rtol=1e-9, atol=1e-9)
    for shared, plain in zip(networks[0].buffers(), networks[1].buffers(), strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-9, atol=1e-9)


def test_logits_of_a_training_step_are_not_made() -> None:
    network = ForLoss(DenseUNet(config(out_channels=118, deep_supervision=False)))
    plain = nn.Sequential(network.network)
    peaks = {}
    for name, module in (("deferred", network), ("made", plain)):
        peaks[name] = trace_peak(
            module,
            (1, 1, 32, 32, 32),
            loss=loss_of(),
            label_shape=(1, 32, 32, 32),
            device="cpu",
        ).peak_bytes
    logits = 118 * 32**3 * 4
    assert peaks["deferred"] < logits
    assert peaks["made"] > 2 * logits


def test_the_planner_traces_what_training_runs() -> None:
    subject = PlannedTraining(
        build_config=lambda patch, mode: config(out_channels=118, memory=mode),
        loss=LossConfig(),
        ignored=True,
        precision="float32",
        device="cpu",
    )
    patch, shape = (32, 32, 32), (2, 1, 32, 32, 32)
    reports = {
        mode: subject.trace(subject.network(patch, mode), patch, 2) for mode in ("shared", "plain")
    }
    training = trace_peak(
        ForLoss(DenseUNet(config(out_channels=118))),
        shape,
        loss=DeepSupervisionLoss(loss_of(ignore_label=118)),
        label_shape=(2, 32, 32, 32),
        label_dtype=torch.uint8,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        device="cpu",
    )
    logits = 2 * 118 * 32**3 * 4
    assert reports["shared"].peak_bytes == training.peak_bytes < logits
    assert reports["plain"].peak_bytes > 2 * logits


def test_training_leaves_the_logits_to_the_loss(
    tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, labels = torch.randn(2, 1, 8, 8, 8), batch((8, 8, 8), classes=3)[1]
    values = {}
    state = SegmentationModule(tiny_plan).state_dict()
    monkeypatch.setattr(SegmentationModule, "log", lambda *args, **kwargs: None)
    for memory in ("plain", "shared"):
        network = tiny_plan.network.model_copy(update={"memory": memory})
        module = SegmentationModule(tiny_plan.model_copy(update={"network": network}))
        module.load_state_dict(state)
        if memory == "shared":
            monkeypatch.setattr(DenseUNet, "forward", None)
        values[memory] = module.training_step((image, labels), 0).detach()
    torch.testing.assert_close(values["shared"], values["plain"], rtol=1e-6, atol=1e-6)
