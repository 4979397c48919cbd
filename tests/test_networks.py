"""Dense blocks and networks: one state dict, three ways to compute, the same numbers."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from effseg.errors import GeometryError, PlanError
from effseg.kernels import tiles
from effseg.memory import measure_peak
from effseg.networks import DenseBlock, DenseUNet, NormActConv
from effseg.plans import NetworkConfig

MODES = ("plain", "shared", "checkpoint")
SPACE = (5, 6, 7)


def three(build, *, train: bool = True) -> dict[str, nn.Module]:
    """The same module in each memory mode, float64, with weights that are not symmetric."""
    modules = {mode: build(mode).double() for mode in MODES}
    for parameter in modules["plain"].parameters():
        nn.init.normal_(parameter)
    for module in modules.values():
        module.load_state_dict(modules["plain"].state_dict())
        module.train(train)
    return modules


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, input gradient, parameter gradients and buffers after one step."""
    torch.manual_seed(3)  # dropout draws the same masks
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [y.detach(), x.grad, *gradients, *(buffer.double() for buffer in module.buffers())]


def assert_same(modules: dict[str, nn.Module], x: Tensor, *, tolerance: float = 1e-11) -> None:
    expected = results(modules["plain"], x)
    for mode in ("shared", "checkpoint"):
        for want, got in zip(expected, results(modules[mode], x), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("norm", "act", "dims", "train", "dropout"),
    list(product(("batch", "instance"), ("relu", "leaky_relu"), (2, 3), (True, False), (0.0, 0.3))),
)
def test_three_memory_modes_give_the_same_numbers(norm, act, dims, train, dropout) -> None:
    modules = three(
        lambda mode: DenseBlock(
            5,
            3,
            3,
            bottleneck=2,
            norm=norm,
            act=act,
            dropout=dropout,
            memory=mode,
            spatial_dims=dims,
        ),
        train=train,
    )
    if not train and norm == "batch":
        for module in modules.values():
            for part in module.modules():
                if isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d):
                    part.running_mean.fill_(0.3)
                    part.running_var.fill_(1.7)
    assert_same(modules, torch.randn(2, 5, *SPACE[:dims], dtype=torch.float64))


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_act_conv_gives_the_same_numbers(norm, bias) -> None:
    modules = three(lambda mode: NormActConv(6, 4, norm=norm, bias=bias, memory=mode))
    assert_same(modules, torch.randn(2, 6, *SPACE, dtype=torch.float64))


@pytest.mark.parametrize("strips", [1, 3, 32])
def test_many_tiles_give_what_one_gives(strips, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = three(lambda mode: DenseBlock(4, 3, 2, norm="instance", memory=mode))
    x = torch.randn(2, 4, 9, 10, 11, dtype=torch.float64)
    monkeypatch.setattr(
        tiles, "TILE_BYTES", {"cpu": 1, "cuda": 1}
    )  # the floor of 256 voxels a tile
    monkeypatch.setattr(tiles, "STRIPS", strips)
    found = tiles.strips_of([torch.empty(2, 990, 4)])
    assert len(found) == {1: 2, 3: 2, 32: 8}[strips]
    assert sum(len(strip) for strip in found) == 8
    assert_same(modules, x)


def test_gradients_are_those_of_the_function() -> None:
    block = DenseBlock(2, 2, 2, bottleneck=1, norm="instance", act="leaky_relu").double()
    x = torch.randn(1, 2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in block.parameters()]
    names = [name for name, _ in block.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_a_second_derivative_is_refused() -> None:
    block = DenseBlock(2, 2, 1).double()
    x = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_move_once_a_step(mode) -> None:
    block = DenseBlock(3, 2, 2, memory=mode)
    block(torch.randn(2, 3, 4, 4, 4)).sum().backward()
    counts = [b for name, b in block.named_buffers() if name.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [1, 1, 1, 1]


def test_names_are_those_of_torchvision() -> None:
    names = {name for name, _ in DenseBlock(3, 2, 2).named_parameters()}
    assert {"denselayer1.norm1.weight", "denselayer2.conv2.weight"} <= names
    assert len(names) == 12


def test_bfloat16_stays_close_to_float32() -> None:
    block = DenseBlock(8, 8, 3, norm="instance", act="leaky_relu")
    x = torch.randn(2, 8, 8, 8, 8)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = block(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).detach().abs().max().item() < 0.1
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize(("n_layers", "c0", "growth"), [(4, 32, 16), (3, 16, 8)])
def test_the_shared_block_saves_its_output_and_a_few_numbers_a_channel(
    n_layers, c0, growth
) -> None:
    block = DenseBlock(c0, growth, n_layers, norm="batch")
    x = torch.randn(1, c0, 12, 12, 12, requires_grad=True)
    report = measure_peak(lambda: block(x).sum().backward())
    features = block.out_channels * 12**3 * 4
    middle = block.layers()[0].conv1.out_channels
    numbers = 4 * (2 * block.out_channels + 2 * n_layers * middle)
    assert report.saved_bytes == features + numbers


def test_shared_takes_less_than_checkpoint_takes_less_than_plain() -> None:
    peaks = {}
    for mode in MODES:
        block = DenseBlock(16, 16, 4, memory=mode)
        # of a single sample torch convolves channels-first here, and what it returns is copied
        x = torch.randn(2, 16, 16, 16, 16, requires_grad=True)
        peaks[mode] = measure_peak(lambda block=block, x=x: block(x).sum().backward()).peak_bytes
    assert peaks["shared"] < 0.9 * peaks["checkpoint"]
    assert peaks["checkpoint"] < 0.75 * peaks["plain"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"in_channels": 0}, "at least 1"),
        ({"kernel_size": 2}, "odd"),
        ({"spatial_dims": 4}, "2 or 3 axes"),
        ({"memory": "less"}, 'expected "shared"'),
    ],
)
def test_impossible_blocks_are_refused(arguments, words) -> None:
    with pytest.raises(PlanError, match=words):
        DenseBlock(**({"in_channels": 4, "growth_rate": 2, "n_layers": 1} | arguments))


def config(**changes) -> NetworkConfig:
    given = {
        "in_channels": 2,
        "out_channels": 3,
        "stem_channels": 8,
        "growth_rate": 4,
        "encoder_layers": (1, 2),
        "decoder_layers": (1,),
        "strides": ((1, 1, 1), (1, 2, 2)),
        "kernels": ((1, 3, 3), (3, 3, 3)),
    }
    return NetworkConfig(**(given | changes))


def test_networks_of_the_three_modes_agree() -> None:
    modules = three(lambda mode: DenseUNet(config(memory=mode)))
    assert_same(modules, torch.randn(1, 2, 3, 4, 6, dtype=torch.float64), tolerance=1e-9)


def test_a_stage_may_keep_the_coarse_axis() -> None:
    network = DenseUNet(config())
    assert network(torch.randn(1, 2, 5, 8, 4)).shape == (1, 3, 5, 8, 4)
    assert network.encoder[0].denselayer1.conv2.kernel_size == (1, 3, 3)


def test_deep_supervision_gives_a_list_in_training_only() -> None:
    network = DenseUNet(
        config(
            deep_supervision=True,
            encoder_layers=(1, 1, 1),
            decoder_layers=(1, 1),
            strides=((1, 1, 1), (2, 2, 2), (1, 2, 2)),
            kernels=((3, 3, 3),) * 3,
        )
    )
    x = torch.randn(1, 2, 4, 8, 8)
    finest, coarser = network(x)
    assert finest.shape == (1, 3, 4, 8, 8)
    assert coarser.shape == (1, 3, 2, 4, 4)
    assert network.eval()(x).shape == (1, 3, 4, 8, 8)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 2, 4, 5, 4), "multiple of the network's total stride"), ((1, 1, 4, 4, 4), "expected")],
)
def test_inputs_that_do_not_fit_are_refused(shape, words) -> None:
    with pytest.raises(GeometryError, match=words):
        DenseUNet(config())(torch.zeros(shape))
