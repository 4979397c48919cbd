"""Branching tubes: the vessels and airways of a lung, and how they fill voxels.

A tube's radius follows Murray's law (r^3 = r1^3 + r2^3 at every fork; Murray CD, "The physiological
principle of minimum work", PNAS 12:207-214, 1926), so that twigs of nodule-like width are many.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from chest import Frame


@dataclass(frozen=True, eq=False)
class Tubes:
    """Balls along the middle of tubes, close enough to each other to make tubes.

    Attributes:
        centres_mm: (n, 3), (z, y, x).
        radii_mm: (n,).
    """

    centres_mm: np.ndarray
    radii_mm: np.ndarray


def grow(
    rng: np.random.Generator,
    *,
    root_mm: tuple[float, float, float],
    directions: np.ndarray,
    radius_mm: float,
    stop_mm: float,
    length: float,
    middle_mm: tuple[float, float, float],
    is_allowed: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Tubes:
    """Grow trees from one root.

    Args:
        rng: draws lengths, bends and forks.
        root_mm: where all trees start, (z, y, x).
        directions: (n, 3), where each tree's trunk points.
        radius_mm: the trunks'.
        stop_mm: twigs end at this radius.
        length: of a tube between two forks, in radii.
        middle_mm: thick tubes turn this way where they may not go on.
        is_allowed: (n, 3) places in mm and (n,) radii to (n,) bool; twigs end at the first no.
    """
    heads = np.repeat(np.asarray(root_mm)[None], len(directions), axis=0)
    ways = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    radii = np.full(len(heads), radius_mm) * rng.uniform(0.7, 1, len(heads))
    centres, widths = [heads], [radii]
    while len(heads):
        lengths = radii * length * rng.uniform(0.7, 1.4, len(radii)) + 2
        n_steps = int(np.ceil((lengths / np.maximum(radii * 0.5, 0.35)).max()))
        alive = np.ones(len(heads), bool)
        for _ in range(n_steps):
            steps = lengths / n_steps
            # Bends grow with the root of the way, so that step sizes do not matter.
            bend = 0.35 * np.sqrt(steps / lengths)[:, None]
            ways = ways + bend * rng.standard_normal(ways.shape)
            ways /= np.linalg.norm(ways, axis=1, keepdims=True)
            ahead = heads + ways * steps[:, None]
            blocked = ~is_allowed(ahead, radii)
            alive &= ~(blocked & (radii < 3 * stop_mm))
            inwards = np.asarray(middle_mm) - heads[blocked]
            ways[blocked] += 0.4 * inwards / np.linalg.norm(inwards, axis=1, keepdims=True)
            heads = np.where(blocked[:, None], heads, ahead)
            centres.append(heads[alive & ~blocked])
            widths.append(radii[alive & ~blocked])
        share = rng.uniform(0.1, 0.5, alive.sum())
        heads, ways, parents = heads[alive], ways[alive], radii[alive]
        side = np.cross(ways, rng.standard_normal(ways.shape))
        side /= np.linalg.norm(side, axis=1, keepdims=True)
        # The thinner child turns further.
        turns = np.tan(rng.uniform(0.25, 0.5, len(heads)) * np.stack([2.2 * share, 2 - 2 * share]))
        ways = np.concatenate([ways + turns[0, :, None] * side, ways - turns[1, :, None] * side])
        ways /= np.linalg.norm(ways, axis=1, keepdims=True)
        radii = np.concatenate([np.cbrt(1 - share) * parents, np.cbrt(share) * parents])
        heads = np.concatenate([heads, heads])
        thick = radii > stop_mm
        heads, ways, radii = heads[thick], ways[thick], radii[thick]
    return Tubes(centres_mm=np.concatenate(centres), radii_mm=np.concatenate(widths))


def fill(tubes: Tubes, frame: Frame) -> np.ndarray:
    """Mark the voxels of a frame whose middle lies in a tube, bool.

    Args:
        tubes: those whose centres lie outside the frame are left out.
        frame: where to; its voxels should not be wider than the thinnest tube.
    """
    places = (tubes.centres_mm - np.asarray(frame.corner_mm)) / np.asarray(frame.spacing)
    inside = ((places >= 0) & (places < frame.shape)).all(axis=1)
    radii = np.round(tubes.radii_mm[inside] / 0.1) * 0.1
    pad = np.ceil(radii.max(initial=0) / np.asarray(frame.spacing)).astype(int)
    marks = np.zeros(np.asarray(frame.shape) + 2 * pad, bool)
    strides = np.asarray([marks.shape[1] * marks.shape[2], marks.shape[2], 1])
    cells = (np.floor(places[inside]).astype(np.int64) + pad) @ strides
    for radius in np.unique(radii):
        reach = [int(radius / step) for step in frame.spacing]
        near = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), -1)
        ball = near[np.linalg.norm(near * frame.spacing, axis=-1) <= radius] @ strides
        marks.ravel()[np.unique(cells[radii == radius])[:, None] + ball] = True
    z, y, x = (slice(p, p + n) for p, n in zip(pad, frame.shape, strict=True))
    return marks[z, y, x]
