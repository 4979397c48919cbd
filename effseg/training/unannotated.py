"""Scans without labels as cases of a training, which ignores them voxel by voxel."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from effseg.dataset import Case
from effseg.io import SlabWriter, read_grid
from effseg.plans import Plan


def unannotated_cases(plan: Plan, folder: Path) -> list[Case]:
    """The scans without labels of a plan, as cases that are ignored voxel by voxel.

    Args:
        plan: that names them.
        folder: where their label maps go.

    Raises:
        DataError: if a scan cannot be read.
    """
    distillation = plan.training.distillation
    scans: Mapping[str, tuple[str, ...]] = {} if distillation is None else distillation.unannotated
    cases = []
    for name, images in scans.items():
        assert plan.ignore_label is not None
        grid, _ = read_grid(images[0])
        label = folder / f"{name}.nii.gz"
        dtype = np.min_scalar_type(plan.ignore_label)
        with SlabWriter(label, grid, dtype) as writer:
            plane = np.full((1, *grid.shape[1:]), plan.ignore_label, dtype=dtype)
            for start in range(grid.shape[0]):
                writer.write(start, plane)
        # one of the data set may have the same name
        cases.append(Case(name=f"unannotated {name}", images=tuple(map(Path, images)), label=label))
    return cases
