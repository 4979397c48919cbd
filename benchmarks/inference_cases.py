"""What the inference suite runs, each call to be made in a fresh process: bytes beside seconds.

The networks are light and pointwise, so that what is measured is what prediction holds, not what a
network does: torch lays out 27 columns of a window for a 3x3x3 convolution of one channel.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import torch
from made_up_facts import made_up_facts
from scipy import ndimage
from torch import Tensor, nn

import effseg
from effseg import Grid, Plan, Predictor, Volume
from effseg.inference import Run, forecast
from effseg.memory import PeakResident
from effseg.memory.resident import peak_resident_bytes
from effseg.networks import build_network
from effseg.plans import (
    Channel,
    Label,
    Memory,
    NetworkConfig,
    Normalisation,
    PostprocessConfig,
)
from effseg.postprocess import ComponentStream
from effseg.resample import AffineHead, logits_to_labels
from effseg.tiling import gaussian_weights, windows
from effseg.types import Array, Shape3, Spacing

TIE = 1e-4
"""Two logits nearer than this are one: float32 sums in another order differ by less."""


@dataclass(frozen=True)
class Measured:
    """What one call took.

    Attributes:
        peak_bytes: of resident memory, above what was there with its input loaded.
        seconds: of its wall clock.
        n_different: labels that are not those of the reference.
        n_ties: voxels whose two largest logits are equal, which were not compared.
        predicted_bytes: what was foretold of the peak.
        process_bytes: the peak with everything, the imports included.
    """

    peak_bytes: int = 0
    seconds: float = 0.0
    n_different: int | None = None
    n_ties: int | None = None
    predicted_bytes: int | None = None
    process_bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """A sliding window over an image.

    Attributes:
        n_classes: of the labels.
        n_features: that a 1x1x1 convolution reads; None: the network does not end in one.
        shape: of the image.
        window: of the network.
        overlap: of two windows.
        on_disk: the label map goes to a file.
        features: blend features, whatever the number of classes.
    """

    n_classes: int = 25
    n_features: int | None = None
    shape: Shape3 = (480, 160, 160)
    window: Shape3 = (96, 96, 96)
    overlap: float = 0.5
    on_disk: bool = False
    features: bool = False

    @property
    def values(self) -> int:
        """Classes times voxels."""
        return self.n_classes * int(np.prod(self.shape))

    def network(self, seed: int = 0) -> nn.Module:
        """With fresh weights."""
        torch.manual_seed(seed)
        if self.n_features is None:
            # an affine last layer would be left out, and its one feature blended
            return nn.Sequential(nn.Conv3d(1, self.n_classes, 1), nn.LeakyReLU(inplace=True)).eval()
        body = [nn.Conv3d(1, self.n_features, 1), nn.ReLU(inplace=True)]
        head = [] if self.features else [nn.Conv3d(self.n_features, self.n_classes, 1)]
        return nn.Sequential(*body, *head).eval()

    def image(self) -> Array:
        """(z, y, x) float32."""
        return np.random.default_rng(0).standard_normal(self.shape, dtype=np.float32)


def by_effseg(case: Case, network: nn.Module, image: Array) -> Array | None:
    predictor = Predictor(network, case.window, overlap=case.overlap)
    if case.features:
        assert case.n_features is not None
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((case.n_classes, case.n_features), dtype=np.float32)
        head = AffineHead(weight=weight, bias=np.zeros(case.n_classes, np.float32))
        grid = Grid(case.shape)
        return logits_to_labels(replace(predictor.slabs(image[None]), head=head), grid, grid).array
    if not case.on_disk:
        return predictor.predict(image).array
    with tempfile.TemporaryDirectory() as folder:
        predictor.predict(image, out=Path(folder) / "labels.nii")
    return None


@torch.inference_mode()
def by_monai(case: Case, network: nn.Module, image: Array) -> Array:
    from monai.inferers import sliding_window_inference

    logits = sliding_window_inference(
        torch.from_numpy(image)[None, None],
        case.window,
        1,
        network,
        overlap=case.overlap,
        mode="gaussian",
    )
    return logits[0].argmax(dim=0).to(torch.uint8).numpy()


@torch.inference_mode()
def by_torchio(case: Case, network: nn.Module, image: Array) -> Array:
    import torchio

    subject = torchio.Subject(image=torchio.ScalarImage(tensor=torch.from_numpy(image)[None]))
    overlap = [int(n * case.overlap) // 2 * 2 for n in case.window]
    sampler = torchio.GridSampler(subject, case.window, overlap)
    aggregator = torchio.GridAggregator(sampler, overlap_mode="hann")
    for patch in sampler:
        logits = network(patch["image"].data[None])
        aggregator.add_batch(logits, patch[torchio.LOCATION][None])
    return aggregator.get_output_tensor().argmax(dim=0).to(torch.uint8).numpy()


@torch.inference_mode()
def by_konfai(case: Case, network: nn.Module, image: Array) -> Array:
    """Slab by slab as its streamed export does, each slab made into labels and let go."""
    from konfai.data.patching import Gaussian, StreamingAccumulator
    from konfai.utils.utils import get_patch_slices_from_shape

    window = list(case.window)
    overlap = [int(n * case.overlap) for n in window]
    boxes = get_patch_slices_from_shape(window, list(image.shape), overlap)
    combine = Gaussian()
    combine.set_patch_config(window, overlap)
    accumulator = StreamingAccumulator(boxes, window, combine)
    labels = np.empty(image.shape, np.uint8)

    def put(slabs: list[tuple[slice, Tensor]]) -> None:
        for planes, logits in slabs:
            labels[planes] = logits[0].argmax(dim=0).to(torch.uint8).numpy()

    for index, box in enumerate(boxes):
        part = torch.from_numpy(image[box])
        missing = [n - m for n, m in zip(window, part.shape, strict=True)]  # of the last windows
        padding = [amount for n in reversed(missing) for amount in (0, n)]
        put(accumulator.add_layer(index, network(nn.functional.pad(part, padding)[None, None])))
    put(accumulator.finalize())
    return labels


BLENDERS: dict[str, Callable[[Case, nn.Module, Array], Array | None]] = {
    "effseg": by_effseg,
    "monai": by_monai,
    "torchio": by_torchio,
    "konfai": by_konfai,
}


def blend(tool: str, case: Case) -> Measured:
    """Labels of an image by one tool."""
    by = BLENDERS[tool]
    side = min(16, *case.window)
    small = replace(case, shape=(side + 1, side, side), window=(side, side, side))
    by(small, small.network(), small.image())  # loads what is loaded once
    network, image = case.network(), case.image()
    return measured(lambda: by(case, network, image))


def blend_in_turns(tools: Sequence[str], case: Case, rounds: int) -> list[list[float]]:
    """Seconds of each tool on one case, in turns to and fro, after one that does not count."""
    network, image = case.network(), case.image()
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    order = list(tools)
    for _ in range(1 + rounds):
        for tool in order:
            start = time.perf_counter()
            BLENDERS[tool](case, network, image)
            seconds[tool].append(time.perf_counter() - start)
        order.reverse()  # what slows a machine down for a while slows either
    return [of_tool[1:] for of_tool in seconds.values()]


def against_in_memory(case: Case, n_folds: int) -> Measured:
    """Labels with 8 mirrors and several folds, against logits of the whole in float32."""
    networks = [case.network(seed) for seed in range(n_folds)]
    image = case.image()
    predictor = Predictor(networks, case.window, overlap=case.overlap, tta=True)
    return compared(predictor.predict(image).array, in_memory(networks, image, case))


@torch.inference_mode()
def in_memory(networks: Sequence[nn.Module], image: Array, case: Case) -> Tensor:
    """Logits (classes, z, y, x), blended as a whole in float32."""
    axes = (2, 3, 4)
    mirrors = list(chain.from_iterable(combinations(axes, n) for n in range(4)))
    weights = torch.from_numpy(gaussian_weights(case.window))
    total, share = torch.zeros((case.n_classes, *case.shape)), torch.zeros(case.shape)
    for box in windows(case.shape, case.window, overlap=case.overlap):
        window = torch.from_numpy(image[box])[None, None]
        passed = [network(window.flip(m)).flip(m)[0] for network in networks for m in mirrors]
        total[(slice(None), *box)] += sum(passed) / len(passed) * weights
        share[box] += weights
    return total / share


def compared(labels: Array, logits: Tensor) -> Measured:
    """How many labels are not the largest logit's, ties aside."""
    (first, second), index = torch.topk(logits, 2, dim=0)
    ties = first - second < TIE
    different = (torch.from_numpy(labels.astype(np.int64)) != index[0]) & ~ties
    return Measured(n_different=int(different.sum()), n_ties=int(ties.sum()))


def export(tool: str, n_classes: int, source: int, target: int) -> Measured:
    """Logits on a cube made into labels on a finer one; with effseg's the labels are compared."""
    shape, finer = (source,) * 3, (target,) * 3
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((n_classes, *shape), dtype=np.float32)
    spacing = source / target
    origin = (spacing - 1) / 2  # the outer faces of the two cubes are one
    grid = Grid(finer, spacing=(spacing,) * 3, origin=(origin,) * 3)
    if tool == "effseg":
        logits_to_labels(logits[:, :4, :4, :4].copy(), Grid((4, 4, 4)), Grid((4, 4, 4)))
        labels: list[Array] = []
        result = measured(lambda: labels.append(logits_to_labels(logits, Grid(shape), grid).array))
        counts = compared(labels[0], interpolated(logits, finer))
        return replace(result, n_different=counts.n_different, n_ties=counts.n_ties)
    logits = logits.astype(np.float16)
    return measured(lambda: zoomed_labels(logits, finer))


def zoomed_labels(logits: Array, shape: Shape3) -> Array:
    """As nnU-Net exports: float64, each class resized by skimage and kept in half, argmax of all.

    `skimage.transform.resize(order=1, mode="edge", anti_aliasing=False)` is this call of scipy
    (nnunetv2/preprocessing/resampling/default_resampling.py).

    Args:
        logits: (classes, z, y, x) float16, as its predictor hands them on.
        shape: of the labels.
    """
    resized = np.empty((len(logits), *shape), dtype=logits.dtype)
    factors = [n / m for n, m in zip(shape, logits.shape[1:], strict=True)]
    for source, target in zip(logits.astype(np.float64), resized, strict=True):
        target[...] = ndimage.zoom(source, factors, order=1, mode="nearest", grid_mode=True)
    return torch.from_numpy(resized).argmax(0).to(torch.uint8).numpy()


def interpolated(logits: Array, shape: Shape3) -> Tensor:
    """Logits on a finer cube, by torch in float32."""
    result = torch.empty((len(logits), *shape))
    for source, target in zip(torch.from_numpy(logits), result, strict=True):
        target.copy_(nn.functional.interpolate(source[None, None], shape, mode="trilinear")[0, 0])
    return result


def whole_body(
    shape: Shape3, n_classes: int, patch: int, spacing: float, spacings: Spacing
) -> Measured:
    """From a .nii of int16 to a .nii.gz of many classes, through a run: predicted and measured."""
    grid = Grid(shape, spacing=spacings)
    run = light_run(n_classes, patch=patch, spacing=spacing)
    small = Grid((8, 8, 8), spacing=spacings)
    effseg.predict(run, Volume(array=np.zeros(small.shape, np.int16), grid=small))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.nii"
        rng = np.random.default_rng(0)
        # planes of few distinct values, so that neither making nor writing them is the work
        voxels = np.empty(shape, np.int16)
        voxels[...] = rng.integers(-1000, 1000, (shape[0], shape[1] // 8, 1)).repeat(8, axis=1)
        effseg.write_volume(Volume(array=voxels, grid=grid), image)
        del voxels
        predicted = forecast(run, grid, writes=True, file_voxel_bytes=2).peak_bytes
        out = Path(folder) / "labels.nii.gz"
        result = measured(lambda: effseg.predict(run, image, out=out) and None)
        return replace(result, predicted_bytes=predicted, process_bytes=peak_resident_bytes())


def light_run(n_classes: int, *, patch: int, spacing: float) -> Run:
    """A run as training leaves it, with a network that takes little time and fresh weights."""
    config = NetworkConfig(
        in_channels=1,
        out_channels=n_classes,
        stem_channels=8,
        growth_rate=4,
        encoder_layers=(1, 1),
        decoder_layers=(1,),
        strides=((1, 1, 1), (2, 2, 2)),
        kernels=((3, 3, 3), (3, 3, 3)),
    )
    normalisation = Normalisation(kind="ct", low=-1000, high=1000, mean=0, std=500)
    plan = Plan(
        dataset="benchmark",
        channels=(Channel(name="CT", normalisation=normalisation),),
        labels=tuple(Label(value=v, name=f"label {v}") for v in range(n_classes)),
        spacing=(spacing,) * 3,
        patch_size=(patch,) * 3,
        batch_size=1,
        network=config,
        memory=Memory(budget_bytes=1, peak_bytes=1, saved_bytes=0),
        fingerprint=made_up_facts(patch, spacing=spacing),
    )
    torch.manual_seed(0)
    return Run(folder=Path("benchmark"), plan=plan, network=build_network(config).eval())


def streamed_components(shape: Shape3, n_labels: int, thickness: int) -> Measured:
    """Components of a label map that comes in slabs, removed below a volume, and cleaned slabs."""

    def stream(shape: Shape3) -> None:
        with ComponentStream(1.0, PostprocessConfig(minimum_mm3=6000)) as components:
            for slab in brick_slabs(shape, n_labels, thickness):
                components.add(slab)
            assert components.finish()
            for _ in components.cleaned():
                pass

    stream((2 * thickness, 32, 32))
    return measured(lambda: stream(shape))


def brick_slabs(shape: Shape3, n_labels: int, thickness: int) -> Iterator[Array]:
    """A label map of bricks, half of them background, slab by slab."""
    rng = np.random.default_rng(0)
    high, deep, wide = 20, 16, 16
    size = (-(-shape[0] // high), -(-shape[1] // deep), -(-shape[2] // wide))
    bricks = rng.integers(1, n_labels + 1, size, dtype=np.uint8)
    bricks[rng.random(size) < 0.5] = 0
    for start in range(0, shape[0], thickness):
        planes = np.arange(start, min(start + thickness, shape[0])) // high
        slab = bricks[planes].repeat(deep, axis=1).repeat(wide, axis=2)
        yield np.ascontiguousarray(slab[:, : shape[1], : shape[2]])


def measured(call: Callable[[], object]) -> Measured:
    """What a call takes; its result lives to its end."""
    gc.collect()
    resident = PeakResident().start()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    peak_bytes = resident.stop()
    del result
    return Measured(peak_bytes=peak_bytes, seconds=seconds)
