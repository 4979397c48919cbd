"""The block that stores every feature once: segments, bytes, and whose memory it writes into."""

from itertools import product

import pytest
import torch
from monai.networks.nets.densenet import _DenseBlock as MonaiBlock
from torch import Tensor, nn
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from effseg.kernels import tiles
from effseg.kernels.ownership import sole_holders
from effseg.memory import measure_peak, trace_peak
from effseg.networks import DenseBlock, NormActConv

SHAPES = [(4, 32, 16), (6, 32, 16), (8, 64, 16), (12, 64, 16), (16, 64, 32)]


def pair(build) -> tuple[nn.Module, nn.Module]:
    """The same module with shared and with plain memory, float64."""
    shared, plain = build("shared").double(), build("plain").double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    shared.load_state_dict(plain.state_dict())
    return shared, plain


def gradients(module: nn.Module, inputs: list[Tensor], read) -> list[Tensor]:
    """Result and all gradients; `read` makes one tensor of what the module returns."""
    return run_for_gradients(module, module, inputs, read)


def run_for_gradients(module: nn.Module, run, inputs: list[Tensor], read) -> list[Tensor]:
    """The same of `run`, which computes with the module's parameters."""
    torch.manual_seed(3)
    module.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = read(run(inputs))
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    of_parameters = [parameter.grad for parameter in module.parameters()]
    return [y.detach(), *(x.grad for x in inputs), *of_parameters]


def joined(segments: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat(segments, dim=1)


@pytest.mark.parametrize(
    ("norm", "dims", "dropout", "train"),
    list(product(("batch", "instance"), (2, 3), (0.0, 0.3), (True, False))),
)
def test_a_block_reads_segments_as_if_concatenated(norm, dims, dropout, train) -> None:
    shared, plain = pair(
        lambda mode: DenseBlock(
            9, 3, 3, bottleneck=2, norm=norm, dropout=dropout, memory=mode, spatial_dims=dims
        )
    )
    shared.train(train)
    plain.train(train)
    space = (5, 6, 7)[:dims]
    inputs = [torch.randn(2, n, *space, dtype=torch.float64) for n in (2, 4, 3)]
    given = gradients(shared, inputs, joined)
    expected = gradients(plain, inputs, joined)
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        list(shared.buffers()), list(plain.buffers()), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_layer_between_blocks_reads_segments_as_if_concatenated(norm) -> None:
    shared, plain = pair(lambda mode: NormActConv(9, 4, norm=norm, bias=True, memory=mode))
    inputs = [torch.randn(2, n, 5, 6, 7, dtype=torch.float64) for n in (2, 4, 3)]
    given = gradients(shared, inputs, lambda y: y)
    expected = gradients(plain, inputs, lambda y: y)
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("memory", ["shared", "checkpoint", "plain"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_block_takes_the_weights_of_monais(dims, memory) -> None:
    theirs = MonaiBlock(dims, 3, 5, 2, 4, 0.0, act="relu", norm="batch")
    ours = DenseBlock(5, 4, 3, bottleneck=2, memory=memory, spatial_dims=dims)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, *(6, 7, 8)[:dims])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    renamed = {
        f"denselayer{i}.layers.{name}": value
        for i in (1, 2, 3)
        for name, value in ours.get_submodule(f"denselayer{i}").state_dict().items()
    }
    theirs.load_state_dict(renamed)
    theirs.eval()
    ours.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


# torch's own compiler instantiates the function that it warns against instantiating
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("parts", [(6,), (4, 2)])
def test_compiles_without_a_break(norm, parts) -> None:
    block = DenseBlock(6, 4, 2, norm=norm, dropout=0.0)
    inputs = [torch.randn(2, n, 5, 6, 7) for n in parts]

    def read(segments: Tensor | tuple[Tensor, ...]) -> Tensor:
        return segments if isinstance(segments, Tensor) else joined(segments)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    as_given = (lambda f: lambda x: f(x[0])) if len(parts) == 1 else (lambda f: f)
    expected = run_for_gradients(block, as_given(block), inputs, read)
    given = run_for_gradients(block, as_given(compiled), inputs, read)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_torchs_own(dtype) -> None:
    torch.manual_seed(0)
    plain = DenseBlock(8, 8, 3, norm="instance", memory="plain")
    shared = DenseBlock(8, 8, 3, norm="instance")
    shared.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 12, 12, 12)

    def run(block: nn.Module) -> list[Tensor]:
        return run_for_gradients(block, lambda x: block(x[0]), [x], lambda y: y)

    expected = run(plain)
    with torch.autocast("cpu", dtype=dtype):
        by_torch, by_us = run(plain), run(shared)
    assert by_us[0].dtype == dtype
    ratios = [
        (got.float() - want).norm() / (other.float() - want).norm()
        for got, other, want in zip(by_us, by_torch, expected, strict=True)
    ]
    assert sum(ratios) / len(ratios) < 1.25


class Watcher(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_who_watches_operators_sees_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = DenseBlock(3, 2, 2), torch.randn(2, 3, 4, 4, 4)
    with Watcher() as watcher:
        watched = gradients(block, [x], joined)
    names = {name for name in watcher.seen if name.startswith("effseg::")}
    assert {"effseg::moments", "effseg::affine_act_linear_backward"} < names
    assert not watcher.seen & {"aten::addcmul", "aten::mm", "aten::threshold_backward"}
    # with nobody there the dispatcher is not asked, and the numbers are the same
    monkeypatch.setattr(CustomOpDef, "__call__", None)
    for given, expected in zip(gradients(block, [x], joined), watched, strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_threads_and_the_cut_of_tiles_change_nothing(norm, monkeypatch: pytest.MonkeyPatch) -> None:
    n_threads, block = torch.get_num_threads(), DenseBlock(6, 4, 2, norm=norm).double()
    x = torch.randn(3, 6, 9, 10, 11, dtype=torch.float64)
    one = gradients(block, [x], joined)
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 1)  # the floor of 256 voxels
    many = gradients(block, [x], joined)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(tiles, "SHARE", 1)
    shared = gradients(block, [x], joined)
    torch.set_num_threads(n_threads)
    torch.testing.assert_close(many, one, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(shared, many, rtol=1e-12, atol=1e-12)


def test_segments_are_handed_on_and_not_copied() -> None:
    block = DenseBlock(6, 4, 2)
    a, b = (torch.randn(1, n, 4, 4, 4).to(memory_format=torch.channels_last_3d) for n in (4, 2))
    with torch.no_grad():
        first, second, new = block((a, b))
    assert first.data_ptr() == a.data_ptr()
    assert second.data_ptr() == b.data_ptr()
    assert new.shape == (1, 8, 4, 4, 4)


@pytest.mark.parametrize(("n_layers", "c0", "growth"), SHAPES)
def test_a_block_takes_its_features_twice_and_its_middle_twice(n_layers, c0, growth) -> None:
    # of a single sample in a single thread torch makes the convolution's gradient channels-first
    n, side = 2, 16
    block = DenseBlock(c0, growth, n_layers)
    reader = NormActConv(block.out_channels, 4)
    x = torch.randn(n, c0, side, side, side, requires_grad=True)

    def step() -> None:
        reader(block(x)).sum().backward()
        block.zero_grad()
        reader.zero_grad()

    report = measure_peak(step)
    unit, middle = 4 * n * side**3, 4 * growth
    parameters = [*block.parameters(), *reader.parameters()]
    weights = 4 * sum(p.numel() for p in parameters)
    # one parameter's gradient stands beside its copy in the parameter's own strides
    beside = 4 * max(p.numel() for p in parameters) + 64 * 1024
    features = 2 * block.out_channels + 2 * middle + growth
    assert report.peak_bytes <= (features + c0) * unit + 2 * weights + beside
    assert report.peak_bytes <= 1.15 * (2 * block.out_channels + 3 * middle) * unit + 2 * weights
    traced = trace_peak(nn.Sequential(block, reader), (n, c0, side, side, side), device="cpu")
    assert traced.saved_bytes == report.saved_bytes


class Reader(torch.autograd.Function):
    """Notes whether it is the sole holder of its result's gradient."""

    sole: bool

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        (Reader.sole,) = sole_holders(gradients)
        return gradients[0]


def squared(y: Tensor, x: Tensor) -> None:
    y.square().sum().backward()


def read_twice(y: Tensor, x: Tensor) -> None:
    (y.square().sum() + y.exp().sum()).backward()


def added_to_another(y: Tensor, x: Tensor) -> None:
    (y + x).square().sum().backward()


def given_by_the_caller(y: Tensor, x: Tensor) -> None:
    gradient = torch.ones_like(y)
    y.backward(gradient)


def asked_for(y: Tensor, x: Tensor) -> None:
    torch.autograd.grad(y.square().sum(), [y, x])


def kept_by_a_hook(y: Tensor, x: Tensor) -> None:
    kept = []
    y.register_hook(kept.append)
    y.square().sum().backward()


def seen_in_part_by_a_hook(y: Tensor, x: Tensor) -> None:
    kept = []
    y.register_hook(lambda gradient: kept.append(gradient[0]))
    y.square().sum().backward()


def viewed(y: Tensor, x: Tensor) -> None:
    y.view(3, 2).square().sum().backward()


def viewed_and_kept(y: Tensor, x: Tensor) -> None:
    kept = []
    z = y.view(3, 2)
    z.register_hook(kept.append)
    z.square().sum().backward()


def viewed_and_kept_below(y: Tensor, x: Tensor) -> None:
    kept = []
    z = y.view(3, 2).view(6)
    z.register_hook(lambda gradient: kept.append(gradient[:2]))
    z.square().sum().backward()


def expanded(y: Tensor, x: Tensor) -> None:
    y.sum().backward()


@pytest.mark.parametrize(
    ("use", "sole"),
    [
        (squared, True),
        (read_twice, True),
        (added_to_another, False),
        (given_by_the_caller, False),
        (asked_for, False),
        (kept_by_a_hook, False),
        (seen_in_part_by_a_hook, False),
        (viewed, True),
        (viewed_and_kept, False),
        (viewed_and_kept_below, False),
        (expanded, False),
    ],
)
def test_a_gradient_that_others_hold_is_told(use, sole) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y = Reader.apply(x)
    use(y, x)
    assert Reader.sole is sole


def test_a_gradient_that_others_hold_stays_as_it_is() -> None:
    shared, plain = pair(lambda mode: DenseBlock(3, 2, 2, memory=mode))
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    found = {}
    for name, block in (("shared", shared), ("plain", plain)):
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        kept: list[Tensor] = []
        y.register_hook(kept.append)
        y.retain_grad()
        given = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        given = given.to(memory_format=torch.channels_last_3d)
        before = given.clone()
        y.backward(given)
        assert torch.equal(given, before)
        assert torch.equal(kept[0], before)
        assert torch.equal(y.grad, before)
        found[name] = leaf.grad
    torch.testing.assert_close(found["shared"], found["plain"], rtol=1e-11, atol=1e-11)


def test_two_backwards_through_one_graph_add_up() -> None:
    shared, plain = pair(lambda mode: DenseBlock(3, 2, 2, memory=mode))
    x = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64)
    found = []
    for block in (shared, plain):
        leaf = x.clone().requires_grad_()
        loss = block(leaf).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_several_threads_work_in_inference_mode(norm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(tiles, "SHARE", 1)
    monkeypatch.setattr(tiles, "TILE_BYTES", {"cpu": 1, "cuda": 1})
    shared, plain = pair(lambda mode: DenseBlock(3, 4, 2, norm=norm, memory=mode).eval())
    with torch.inference_mode():
        x = torch.randn(1, 3, 16, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(shared(x), plain(x))
