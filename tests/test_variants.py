"""Ways to put a `DenseUNet` together: link decoder, pyramid head, residual blocks."""

import pytest
import torch
from torch import Tensor, nn

from effseg.inference.headless import find_headless
from effseg.losses import CompoundLoss, DeepSupervisionLoss
from effseg.memory import measure_peak, trace_peak
from effseg.networks import DenseUNet
from effseg.networks.stages import ResidualDense
from effseg.plans import NetworkConfig

MODES = ("plain", "checkpoint", "shared")
VARIANTS = {
    "linknet": {"decoder": "linknet"},
    "pyramid": {"head": "pyramid"},
    "residual": {"residual": True},
    "all": {"decoder": "linknet", "head": "pyramid", "residual": True},
    "supervised": {"head": "pyramid", "residual": True, "deep_supervision": True},
}


def config(**changes) -> NetworkConfig:
    given = {
        "in_channels": 1,
        "out_channels": 3,
        "stem_channels": 4,
        "growth_rate": 4,
        "encoder_layers": (1, 2, 2),
        "decoder_layers": (1, 2),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        "dropout": 0.2,
    }
    return NetworkConfig(**(given | changes))


def step(network: DenseUNet, *, fused: bool) -> list[Tensor]:
    """Loss, gradients and buffers of one step; with the head in the network or in the loss."""
    torch.manual_seed(3)  # the same data, and the same channels dropped
    image = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 8, 8))
    loss = (
        DeepSupervisionLoss(CompoundLoss()) if network.config.deep_supervision else CompoundLoss()
    )
    value = loss(network.for_loss(image) if fused else network(image), labels)
    value.backward()
    gradients = [image.grad, *(parameter.grad for parameter in network.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [value.detach(), *gradients, *(buffer.double() for buffer in network.buffers())]


@pytest.mark.parametrize(
    ("variant", "norm"), [*((variant, "instance") for variant in VARIANTS), ("all", "batch")]
)
def test_memory_modes_give_the_same_numbers(variant, norm) -> None:
    plain = DenseUNet(config(norm=norm, memory="plain", **VARIANTS[variant])).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    expected = step(plain, fused=False)
    for mode in ("checkpoint", "shared"):
        network = DenseUNet(config(norm=norm, memory=mode, **VARIANTS[variant])).double()
        start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        for fused in (False, True):
            network.load_state_dict(start)  # running statistics as before
            network.load_state_dict(dict(plain.named_parameters()), strict=False)
            network.zero_grad()
            for want, got in zip(expected, step(network, fused=fused), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_what_was_there_before_is_as_it_was() -> None:
    network = DenseUNet(config())
    assert {name.split(".")[0] for name in network.state_dict()} == {
        *("stem", "encoder", "down", "up", "decoder", "heads")
    }
    assert {name.split(".")[2] for name in network.state_dict() if name.startswith("up.")} == {
        *("project", "skip")
    }
    # by hand: 8 channels after stage 0, of a stem and one layer; kept: 8 of each stage
    stem, down = 9 * 4, 2 * 8 + 8 * 8
    assert sum(p.numel() for p in network.stem.parameters()) == stem
    assert sum(p.numel() for p in network.down[0].parameters()) == down


def test_a_residual_stage_leaves_as_wide_as_it_came() -> None:
    block = ResidualDense(5, 2, (3, 3, 3), config())
    x = torch.randn(1, 5, 4, 4, 4)
    nn.init.zeros_(block.fuse.conv.weight)
    torch.testing.assert_close(block(x), x)  # nothing is added: the input itself


@pytest.mark.parametrize(("residual", "is_projected"), [(True, False), (False, True)])
def test_a_link_adds_a_skip_that_fits_as_it_is(residual, is_projected) -> None:
    up = DenseUNet(config(decoder="linknet", residual=residual, stem_channels=8)).up[-1]
    assert any(True for _ in up.skip.parameters()) == is_projected
    nn.init.zeros_(up.project.conv.weight)
    skip = torch.randn(1, 8 if residual else 12, 4, 8, 8)
    coarse = torch.randn(1, up.reduce.norm.num_features, 4, 4, 4)
    torch.testing.assert_close(up(coarse, skip), up.skip(skip))


def test_a_level_adds_a_coarse_voxel_to_all_that_lie_in_it() -> None:
    network = DenseUNet(config(head="pyramid"))
    level = network.pyramid[-1]
    nn.init.zeros_(level.project.conv.weight)
    coarser = torch.randn(1, 4, 3, 2, 2)
    expected = nn.functional.interpolate(coarser, scale_factor=(1, 2, 2), mode="nearest")
    got = level(torch.randn(1, network.decoder[-1].out_channels, 3, 4, 4), coarser)
    torch.testing.assert_close(got, expected)


class ForLoss(nn.Module):
    """A network as training runs it."""

    def __init__(self, network: DenseUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor):
        return self.network.for_loss(image)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["linknet", "pyramid", "residual"])
def test_a_trace_tells_the_bytes_of_a_step(variant, mode) -> None:
    network = ForLoss(DenseUNet(config(dropout=0.0, memory=mode, **VARIANTS[variant])))
    shape = (2, 1, 8, 16, 16)
    traced = trace_peak(
        network,
        shape,
        loss=CompoundLoss(),
        label_shape=(2, 8, 16, 16),
        label_dtype=torch.uint8,
        device="cpu",
    )
    image = torch.randn(shape)
    labels = torch.randint(0, 3, (2, 8, 16, 16), dtype=torch.uint8)
    loss = CompoundLoss()
    held = [*network.parameters(), image, labels]

    def run() -> None:
        loss(network(image), labels).backward()

    measured = measure_peak(run)
    assert traced.peak_bytes == measured.peak_bytes
    assert traced.saved_bytes == measured.saved_bytes
    assert measured.peak_bytes > sum(tensor.nbytes for tensor in held)


def test_a_residual_stage_saves_every_feature_once() -> None:
    block = ResidualDense(16, 3, (3, 3, 3), config(dropout=0.0, growth_rate=8))
    x = torch.randn(1, 16, 12, 12, 12, requires_grad=True)
    report = measure_peak(lambda: block(x * 1).sum().backward())
    wide, middle = 16 + 3 * 8, 4 * 8
    # a mean and a deviation of each feature for the block and again for the fusion, and of middles
    numbers = 4 * (2 * wide + 2 * wide + 3 * 2 * middle)
    assert report.saved_bytes == 4 * wide * 12**3 + numbers


def test_inference_blends_the_features_below_a_pyramid() -> None:
    network = DenseUNet(config(head="pyramid", out_channels=9, stem_channels=4)).eval()
    headless = find_headless(network, (1, 1, 4, 8, 8))
    assert headless is not None
    assert headless.conv.in_channels == 4
    image = torch.randn(1, 1, 4, 8, 8)
    torch.testing.assert_close(headless.conv(headless(image)), network(image))


def test_a_single_stage_has_a_pyramid_of_one_level() -> None:
    network = DenseUNet(
        config(
            head="pyramid",
            encoder_layers=(1,),
            decoder_layers=(),
            strides=((1, 1, 1),),
            kernels=((3, 3, 3),),
        )
    )
    assert network(torch.randn(1, 1, 4, 4, 4)).shape == (1, 3, 4, 4, 4)
    assert len(network.pyramid) == 1
