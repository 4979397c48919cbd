"""How sure a run is of its likeliest label, voxel by voxel, in a byte: to choose thresholds by."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from effseg.dataset import Case
from effseg.evaluation import bins_of
from effseg.inference.budget import budget_of
from effseg.inference.output import LabelFile, files_bytes
from effseg.inference.run import Runs, load_runs
from effseg.inference.task import Task
from effseg.plans import PostprocessConfig
from effseg.resample import LabelSlab, Maps
from effseg.sources import ImageFiles


def write_margins(
    run: Runs,
    case: Case,
    out: Path,
    *,
    memory: str | int | None = None,
    device: str | None = None,
) -> Path:
    """Predict a case and write of each voxel its likeliest foreground label, and how sure that is.

    Written slab by slab on the image's own grid, as 256 i + b: label i of the plan's, and the bin b
    of its logit above the background's (`effseg.evaluation.bins_of`). What `predict` gives at any
    threshold that is a bin's edge can be read off it.

    Args:
        run: as `effseg.inference.predict` takes it.
        case: whose image is predicted.
        out: the file; its suffix names the format.
        memory: as `effseg.inference.predict` takes it.
        device: as `effseg.inference.predict` takes it.

    Raises:
        MemoryBudgetError, DataError, CheckpointError, PlanError: as `effseg.inference.predict`.
    """
    runs = load_runs(run)
    n_labels = len(runs[0].plan.labels)
    given = ImageFiles.judged(case.images, name=case.name)
    dtype = np.min_scalar_type(256 * n_labels - 1)
    task = Task(
        given=given,
        files_bytes=files_bytes(given, out, dtype.itemsize),
        budget_bytes=budget_of(memory, device or runs[0].device),
        tta=False,
        device=device,
        skip_constant=False,
        scratch=out.parent,
    )
    sweep = task.sweep(
        runs,
        PostprocessConfig(),
        writes=True,
        maps=Maps(margin=True),
        region=None,
        cuts=[-np.inf] * (n_labels - 1),  # no voxel is background
    )
    indices = np.zeros(max(sweep.values) + 1, dtype=dtype)
    indices[np.asarray(sweep.values)] = np.arange(n_labels)

    def pieces(done: int) -> Iterator[LabelSlab]:
        for box, labels, made in sweep.pieces(done, None):
            codes = 256 * indices[labels] + bins_of(made[0])
            yield box, codes.astype(dtype, copy=False), made[:0]

    axis = sweep.frame.native_axis
    LabelFile(path=out, grid=given.grid, dtype=dtype, axis=axis).write(pieces)
    return out
