"""Where the foreground of a case is: voxels remembered to centre patches on."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from effseg.postprocess import ComponentStream
from effseg.types import Array, Shape3

VOXELS_PER_LABEL = 4096
VOXELS_PER_COMPONENT = 64
"""Remembered: enough to draw from, little enough to keep."""
DRAWN = 4
"""Times as many are drawn while the slabs pass by, so that chance leaves enough of them."""

Voxels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Places:
    """Samples of a case's foreground voxels, (n, 3) each.

    Attributes:
        components: for each foreground class that the case holds, of each of its components.
        voxels: for each such class, of all its voxels.
    """

    components: dict[int, tuple[Voxels, ...]]
    voxels: dict[int, Voxels]


def sample_places(stream: ComponentStream) -> Places:
    """Draw voxels of each class and of each component from a stream that got all its slabs.

    Which ones does not change from run to run. No foreground: none.
    """
    stream.finish()
    found = stream.components
    if not found:
        return Places(components={}, voxels={})
    rng = np.random.default_rng(0)
    sizes = np.array([component.n_voxels for component in found])
    classes, class_of = np.unique([component.label for component in found], return_inverse=True)
    each = _Sample(sizes, most=VOXELS_PER_COMPONENT, rng=rng)
    every = _Sample(np.bincount(class_of, weights=sizes), most=VOXELS_PER_LABEL, rng=rng)
    first = 0
    for numbers in stream.numbered():
        flat = np.flatnonzero(numbers)
        component = numbers.reshape(-1)[flat] - 1
        shape: Shape3 = (len(numbers), numbers.shape[1], numbers.shape[2])
        each.offer(component, flat, shape=shape, first=first)
        every.offer(class_of[component], flat, shape=shape, first=first)
        first += len(numbers)
    by_component = each.taken()
    components = {
        label: tuple(by_component[i] for i in np.flatnonzero(class_of == index))
        for index, label in enumerate(classes.tolist())
    }
    return Places(components, voxels=dict(zip(classes.tolist(), every.taken(), strict=True)))


@dataclass
class _Sample:
    """Voxels of groups of known size, each as likely to be taken as any other of its group.

    Attributes:
        sizes: voxels in each group, from group 0.
        most: to take of a group.
        rng: decides.
    """

    sizes: Array
    most: int
    rng: np.random.Generator
    _groups: list[Array] = field(default_factory=list, init=False)
    _voxels: list[Voxels] = field(default_factory=list, init=False)

    def offer(self, groups: Array, flat: Array, *, shape: Shape3, first: int) -> None:
        """Keep some of the voxels of a slab, given by group and flat index.

        Args:
            groups: of each voxel.
            flat: where it lies in the slab.
            shape: of the slab.
            first: its first plane.
        """
        chances = DRAWN * self.most / self.sizes
        drawn = self.rng.random(len(flat), dtype=np.float32) < chances[groups]
        voxels = np.stack(np.unravel_index(flat[drawn], shape), axis=1) + np.array([first, 0, 0])
        self._groups.append(groups[drawn])
        self._voxels.append(voxels.astype(np.int32))

    def taken(self) -> list[Voxels]:
        """Of each group, at most as many as are wanted."""
        groups = np.concatenate(self._groups)
        order = np.argsort(groups, kind="stable")
        ends = np.searchsorted(groups[order], np.arange(1, len(self.sizes)))
        parts: list[Voxels] = np.split(np.concatenate(self._voxels)[order], ends)
        return [
            part[self.rng.choice(len(part), self.most, replace=False)]
            if len(part) > self.most
            else part
            for part in parts
        ]
