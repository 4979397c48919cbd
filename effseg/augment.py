"""One random change of a training patch after another, each with its own chance.

The changes and most of their ranges are nnU-Net's (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z, supplementary note 4). Here rotation, zoom and blur are taken in
millimetres, so that they stay what they are where spacings differ, and an axis whose voxels are
much longer than the shortest is neither turned, zoomed nor coarsened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from monai.networks.layers import gaussian_1d
from monai.transforms import AdjustContrast, AffineGrid, Resample
from torch import Tensor
from torch.nn import functional as F

from effseg.errors import DataError, GeometryError
from effseg.plans import AugmentConfig
from effseg.types import Array, FloatArray, Spacing

EQUAL = 1.05  # quarter turns are for planes whose spacings differ by less than this
ANISOTROPIC = 3.0  # an axis this many times coarser than another does not mix with it

# Ranges of what is drawn for each channel; a deviation is the standard deviation of the channel.
NOISE = (0.0, 0.3)  # deviations
BLUR = (0.5, 1.0)  # sigma, in voxels of the finest axis
BRIGHTNESS = (-0.25, 0.25)  # deviations
CONTRAST = (0.75, 1.25)
LOW_RESOLUTION = (0.5, 1.0)  # zoom
GAMMA = (0.7, 1.5)


@dataclass(frozen=True)
class Augmentation:
    """A policy: call it on a patch with a seed.

    It holds no state: the seed alone decides what happens to a patch, in whatever process, order
    or number of workers. Nothing global is read or changed.

    In this order, with the chances of `config` times its overall probability: flips, quarter turns,
    one affine (rotation and zoom about the patch's centre), noise, blur, brightness, contrast, low
    resolution, gamma. Channels share the geometry; each draws its own intensities.

    What the affine brings in from outside the patch repeats the nearest voxel of its edge in the
    image. In the label it is `fill_label`; without one it repeats the edge as well, so that the two
    still agree. Blur continues the edge in the same way, so no face darkens.

    Attributes:
        config: chances and ranges, and how much of them counts at which time of a run.
        spacing: millimetres (z, y, x) of the patch's voxels.
        fill_label: the ignore label, where what comes from outside is to be ignored.
        share: of the run that is over, 0 to 1; of the time, this alone is known.
    """

    config: AugmentConfig
    spacing: Spacing
    fill_label: int | None = None
    share: float = 0.0

    def __call__(
        self, image: Tensor | Array, label: Tensor | Array, *, seed: int | Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Change one patch.

        Quarter turns keep the shape: a plane of unequal lengths takes half turns only.

        Args:
            image: (C, z, y, x), normalised intensities, on the CPU.
            label: (z, y, x) or (1, z, y, x), any integer type, on the CPU.
            seed: a number from 0, or several, such as (seed of the run, epoch, index of the patch).

        Returns:
            Image and label, contiguous and of the shapes given, in float32 and the label's own
            type. They are new memory: the patch given stays as it is.

        Raises:
            GeometryError: if the shapes do not fit each other or hold no voxel.
            DataError: if the label's type is no integer type, or cannot hold `fill_label`.
        """
        changed, moved = _copied(image).to(torch.float32), _copied(label)
        _check(changed, moved, fill_label=self.fill_label)
        shape = moved.shape
        rng = np.random.default_rng(seed)
        changed, moved = self._move(changed, moved.reshape(1, *changed.shape[1:]), rng)
        return self._recolour(changed, rng).contiguous(), moved.reshape(shape).contiguous()

    def _move(
        self, image: Tensor, label: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        axes = [axis for axis in config.flip_axes if self._happens(config.flip, rng)]
        if axes:
            dims = [1 + "zyx".index(axis) for axis in axes]
            image, label = image.flip(dims), label.flip(dims)
        planes = _planes(self.spacing, ratio=EQUAL)
        if planes and self._happens(config.rotate90, rng):
            a, b = planes[rng.integers(len(planes))]
            square = image.shape[1 + a] == image.shape[1 + b]
            turns = int(rng.integers(1, 4)) if square else 2
            image, label = (part.rot90(turns, (1 + a, 1 + b)) for part in (image, label))
        if self._happens(config.affine, rng):
            matrix = _draw_matrix(config, self.spacing, rng)
            image, label = _resampled(image, label, matrix, fill_label=self.fill_label)
        return image, label

    def _recolour(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        def draw(low: float, high: float, change: Callable[[Tensor, float], Tensor]) -> Tensor:
            amounts = rng.uniform(low, high, len(image)).tolist()
            return torch.cat([change(image[i : i + 1], a) for i, a in enumerate(amounts)])

        config = self.config
        if self._happens(config.noise, rng):
            source = torch.Generator().manual_seed(int(rng.integers(2**63)))
            image = draw(*NOISE, lambda x, amount: _noisy(x, amount, source))
        if self._happens(config.blur, rng):
            image = draw(*BLUR, lambda x, sigma: _blurred(x, sigma, self.spacing))
        if self._happens(config.brightness, rng):
            image = draw(*BRIGHTNESS, lambda x, amount: x + amount * x.std(correction=0))
        if self._happens(config.contrast, rng):
            image = draw(*CONTRAST, _stretched)
        if self._happens(config.low_resolution, rng):
            image = draw(*LOW_RESOLUTION, lambda x, zoom: _coarsened(x, zoom, self.spacing))
        if self._happens(config.gamma, rng):
            inverted = bool(rng.random() < 0.5)
            image = draw(*GAMMA, lambda x, gamma: _bent(x, gamma, inverted=inverted))
        return image

    def _happens(self, chance: float, rng: np.random.Generator) -> bool:
        return bool(rng.random() < chance * self.config.probability_at(self.share))


def build_augmentation(
    config: AugmentConfig, *, spacing: Spacing, fill_label: int | None = None
) -> Augmentation:
    """The policy of a plan, for patches of `spacing` mm (z, y, x).

    Args:
        config: chances and ranges.
        spacing: what the network sees, `Plan.spacing`.
        fill_label: for voxels that an affine brings in from outside; None: the edge goes on.
    """
    return Augmentation(config=config, spacing=spacing, fill_label=fill_label)


def _planes(spacing: Spacing, *, ratio: float) -> list[tuple[int, int]]:
    """Pairs of axes whose spacings are at most `ratio` apart."""
    return [
        (a, b)
        for a, b in combinations(range(3), 2)
        if max(spacing[a], spacing[b]) <= ratio * min(spacing[a], spacing[b])
    ]


def _is_fine(spacing: Spacing) -> list[bool]:
    return [length <= ANISOTROPIC * min(spacing) for length in spacing]


def _draw_matrix(config: AugmentConfig, spacing: Spacing, rng: np.random.Generator) -> FloatArray:
    """4 x 4: where a voxel of the result, counted from the centre, comes from."""
    turn = np.eye(3)
    for a, b in _planes(spacing, ratio=ANISOTROPIC):
        angle = np.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
        one = np.eye(3)
        one[[a, b], [a, b]] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turn = turn @ one
    # halving is as likely as doubling
    zoom = np.exp(rng.uniform(*np.log(config.scale)))
    shrink = np.where(_is_fine(spacing), 1 / zoom, 1.0)
    length = np.asarray(spacing)
    matrix = np.eye(4)
    matrix[:3, :3] = (turn * shrink * length) / length[:, None]
    return matrix


def _resampled(
    image: Tensor, label: Tensor, matrix: FloatArray, *, fill_label: int | None
) -> tuple[Tensor, Tensor]:
    grid, _ = AffineGrid(affine=matrix)(image.shape[1:])
    grid = _plain(grid)
    resample = Resample(padding_mode="border", align_corners=False)
    image = _plain(resample(image, grid=grid, mode="bilinear"))
    # float32 holds every label below 2^24
    moved = _plain(resample(label.float(), grid=grid, mode="nearest")).to(label.dtype)
    if fill_label is not None:
        faces = torch.tensor(image.shape[1:]).view(3, 1, 1, 1) / 2
        moved.masked_fill_((grid[:3].abs() > faces).any(0), fill_label)
    return image, moved


def _noisy(channel: Tensor, amount: float, source: torch.Generator) -> Tensor:
    grain = torch.randn(channel.shape, generator=source)
    return channel + grain * (amount * channel.std(correction=0))


def _blurred(channel: Tensor, sigma: float, spacing: Spacing) -> Tensor:
    """Gaussian blur, equally wide in mm along every axis; the edge goes on outside.

    One matrix product an axis: a convolution of a single channel would be padded and copied to
    vectors of 16 channels, which takes ten times the patch.
    """
    z, y, x = (
        _blur_matrix(n, sigma * min(spacing) / length)
        for n, length in zip(channel.shape[1:], spacing, strict=True)
    )
    planes = channel[0] @ x.T
    planes = torch.bmm(y.expand(len(planes), *y.shape), planes)
    return (z @ planes.flatten(1)).view(channel.shape)


def _blur_matrix(n: int, sigma: float) -> Tensor:
    """(n, n): what each voxel along an axis takes of the others; `sigma` in voxels.

    What it would take from beyond an end, the voxel at that end gives.
    """
    weights = gaussian_1d(torch.tensor(sigma))
    reach = len(weights) // 2
    given = torch.arange(n)[:, None] + torch.arange(-reach, reach + 1)
    matrix = torch.zeros(n, n)
    return matrix.scatter_add_(1, given.clamp(0, n - 1), weights.expand(n, -1))


def _stretched(channel: Tensor, factor: float) -> Tensor:
    """Contrast about the mean, within the channel's own range."""
    mean, low, high = channel.mean(), channel.min(), channel.max()
    return ((channel - mean) * factor + mean).clamp(low, high)


def _coarsened(channel: Tensor, zoom: float, spacing: Spacing) -> Tensor:
    """Fewer voxels and back, as if acquired at lower resolution."""
    shape = list(channel.shape[1:])
    fewer = [
        max(1, round(n * zoom)) if fine else n
        for n, fine in zip(shape, _is_fine(spacing), strict=True)
    ]
    coarse = F.interpolate(channel[None], fewer, mode="nearest-exact")
    return F.interpolate(coarse, shape, mode="trilinear")[0]


def _bent(channel: Tensor, gamma: float, *, inverted: bool) -> Tensor:
    """A power of the intensities scaled to 0..1; keeps mean and standard deviation."""
    if bool(channel.min() == channel.max()):
        return channel
    return _plain(AdjustContrast(gamma, invert_image=inverted, retain_stats=True)(channel))


def _plain(tensor: Tensor) -> Tensor:
    # MONAI wraps its results in a tensor type of its own unless a global switch says otherwise
    return tensor.as_subclass(Tensor)


def _copied(values: Tensor | Array) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().clone()
    return torch.from_numpy(np.array(values, order="C"))


def _check(image: Tensor, label: Tensor, *, fill_label: int | None) -> None:
    fits = label.ndim in (3, 4) and label.shape in (image.shape[1:], (1, *image.shape[1:]))
    if image.ndim != 4 or not fits:
        raise GeometryError(
            f"image {tuple(image.shape)} and label {tuple(label.shape)}; expected (C, z, y, x) and "
            "(z, y, x) or (1, z, y, x) of the same voxels"
        )
    if image.numel() == 0:
        raise GeometryError(f"image {tuple(image.shape)} holds no voxel; expected at least one")
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if label.dtype not in integers:
        raise DataError(f"label is {label.dtype}; expected integers: label.to(torch.int16)")
    held = torch.iinfo(label.dtype)
    if fill_label is not None and not held.min <= fill_label <= held.max:
        raise DataError(
            f"label is {label.dtype} ({held.min} to {held.max}), which cannot hold fill_label "
            f"{fill_label}; give a wider integer type"
        )
