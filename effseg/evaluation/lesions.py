"""Lesion by lesion: which were found, how well, and what was found that is none.

Scores in the manner of the BraTS 2023 challenge (Saluja et al., github.com/rachitsaluja/
BraTS-2023-Metrics): components, matched by overlap, one Dice each. It differs in three points, each
so that the numbers need no challenge's settings: nothing is dilated and no volume is left out;
false positives are counted beside the lesion Dice, not as zeros inside it; and a predicted
component that touches several lesions is shared out (below) instead of counting whole for each.

- A lesion is a 26-connected component of one label of the reference. It is detected when one voxel
  or more of it is predicted as its label.
- Its Dice is taken against the predicted components of its label that overlap it, 0 where none
  does. A component that overlaps several lesions is divided among them in proportion to the
  voxels it shares with each, so each predicted voxel is counted once: two lesions joined by a thin
  bridge both score well, one great blob over many lesions scores poorly with all.
- A false positive is a predicted component that overlaps no lesion of its label and no ignored
  voxel. Ignored voxels count in no volume and no Dice.
"""

import numpy as np

from effseg.evaluation.scores import Lesion, LesionScore
from effseg.postprocess import Component, label_components
from effseg.types import Array
from effseg.volume import Grid

CONVENTION = (
    "lesions: 26-connected components of one label, detected when a voxel overlaps; a predicted "
    "component over several lesions is divided in proportion to the overlap; false positive: a "
    "predicted component that overlaps no lesion of its label and no ignored voxel"
)


def score_lesions(
    prediction: Array,
    reference: Array,
    *,
    labels: tuple[int, ...],
    ignore_label: int | None,
    grid: Grid,
) -> tuple[LesionScore, ...]:
    """Score every lesion of every label.

    Args:
        prediction: integers (z, y, x).
        reference: integers (z, y, x); voxels of `ignore_label` are of unknown truth.
        labels: which to score, one result each, in this order.
        ignore_label: the reference's value for unknown, or None.
        grid: where the voxels lie.
    """
    lesion_map, lesions = label_components(reference, grid.voxel_mm3)
    found_map, found = label_components(prediction, grid.voxel_mm3)
    pairs, shared = _contacts(lesion_map, found_map)
    lesion_label, found_label = _labels(lesions), _labels(found)
    of_lesion, of_found = lesion_label[pairs[:, 0]], found_label[pairs[:, 1]]

    sizes = np.array([component.n_voxels for component in found], dtype=np.int64)
    ignored = np.zeros(len(found), dtype=np.int64)
    if ignore_label is not None:
        unknown = of_lesion == ignore_label
        np.add.at(ignored, pairs[unknown, 1], shared[unknown])
    matched = of_lesion == of_found
    pairs, shared = pairs[matched], shared[matched]

    overlap_of_found = np.bincount(pairs[:, 1], weights=shared, minlength=len(found))
    known = sizes - ignored
    claimed = known[pairs[:, 1]] * shared / overlap_of_found[pairs[:, 1]]
    overlap = np.bincount(pairs[:, 0], weights=shared, minlength=len(lesions))
    predicted = np.bincount(pairs[:, 0], weights=claimed, minlength=len(lesions))
    false = (overlap_of_found == 0) & (ignored == 0)
    largest = np.zeros(len(lesions), dtype=np.int64)
    np.maximum.at(largest, pairs[:, 0], sizes[pairs[:, 1]])

    results = []
    for label in labels:
        members = np.flatnonzero(lesion_label == label)
        results.append(
            LesionScore(
                label=label,
                n_reference=len(members),
                n_detected=int(np.count_nonzero(overlap[members])),
                n_false_positives=int(np.count_nonzero(false & (found_label == label))),
                lesions=tuple(
                    _lesion(
                        lesions[i],
                        overlap=overlap[i],
                        predicted=predicted[i],
                        found=largest[i],
                        grid=grid,
                    )
                    for i in members
                ),
            )
        )
    return tuple(results)


def _lesion(
    component: Component, *, overlap: float, predicted: float, found: int, grid: Grid
) -> Lesion:
    z, y, x = grid.index_to_world(np.asarray(component.centroid_index)).tolist()
    return Lesion(
        label=component.label,
        volume_mm3=component.volume_mm3,
        centroid_mm=(z, y, x),
        detected=overlap > 0,
        found_mm3=float(found * grid.voxel_mm3),
        dice=float(2 * overlap / (component.n_voxels + predicted)),
    )


def _labels(components: tuple[Component, ...]) -> Array:
    return np.array([component.label for component in components], dtype=np.int64)


def _contacts(one: Array, other: Array) -> tuple[Array, Array]:
    """Which components of two maps share voxels, (n, 2) from 0, and how many, (n,)."""
    width = int(other.max(initial=0)) + 1
    keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for a, b in zip(one, other, strict=True):
        both = (a > 0) & (b > 0)
        key, n = np.unique(a[both].astype(np.int64) * width + b[both], return_counts=True)
        keys.append(key)
        counts.append(n)
    total, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    shared = np.zeros(len(total), dtype=np.int64)
    np.add.at(shared, inverse, np.concatenate(counts))
    return np.stack([total // width - 1, total % width - 1], axis=1), shared
