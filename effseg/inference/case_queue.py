"""Cases that wait to be labelled: while one is computed, the next is read and the last written."""

import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effseg.dataset import Case, read_image
from effseg.errors import MemoryBudgetError
from effseg.inference.output import files_bytes
from effseg.inference.prediction import forecast
from effseg.inference.run import Run
from effseg.io import write_volume
from effseg.sources import ImageFiles
from effseg.volume import Volume

CaseProgress = Callable[[float, str], None]
"""Called with (cases done, with the share of the one under way; its name)."""


@dataclass(frozen=True)
class CaseResult:
    """What became of one case.

    Attributes:
        name: the case's.
        path: where its label map lies, or would.
        error: why there is none; None where there is one.
        kept: it was there before, and nothing was done.
    """

    name: str
    path: Path
    error: Exception | None = None
    kept: bool = False


@dataclass(frozen=True)
class Job:
    """A case to be predicted, and the bytes that it takes.

    Attributes:
        case: itself.
        files: of its image, judged.
        path: where its label map goes.
        peak_bytes: while it is computed, from its files.
        image_bytes: of its image as read.
        label_bytes: of its label map.
    """

    case: Case
    files: ImageFiles
    path: Path
    peak_bytes: int
    image_bytes: int
    label_bytes: int

    @property
    def reading_bytes(self) -> int:
        """While its image is read: channels apart and side by side, or as stored and as scaled."""
        return 2 * self.image_bytes


class CaseQueue:
    """Cases in their order: one is read, one computed and one written at a time.

    A case is computed when the next one to be computed is known, or at the end.

    Args:
        runs: that label them.
        predict_one: as `predict` with a run and its options, for an image, `out` and `memory`.
        reads_ahead: whether the next case may be read while one is computed.
        writes_behind: whether the last label map may be written while one is computed.
        device: where the network runs; None: the run's.
        budget_bytes: for all that is held at once; None: no limit.
        progress: called after each pass of the network.
        report: called with each result as soon as it is known.

    Attributes:
        results: so far, in the order in which cases ended.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        predict_one: Callable[..., Volume],
        *,
        reads_ahead: bool,
        writes_behind: bool,
        device: str | None,
        budget_bytes: int | None,
        progress: CaseProgress,
        report: Callable[[CaseResult], None],
    ) -> None:
        self.results: list[CaseResult] = []
        self._runs = runs
        self._predict_one = predict_one
        self._reads_ahead = reads_ahead
        self._writes_behind = writes_behind
        self._device = device
        self._budget_bytes = budget_bytes
        self._progress = progress
        self._report = report
        self._threads = ExitStack()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="effseg-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="effseg-write")
        self._next: Job | None = None
        self._reading: Future[Volume] | None = None  # of the next, where it is read ahead
        self._written: tuple[Job, Future[Path]] | None = None

    def __enter__(self) -> "CaseQueue":
        # left in any way, an interrupt included, a label map that is being written is finished
        self._threads.enter_context(self._writer)
        self._threads.enter_context(self._reader)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._compute(following=None)
            self._finish_writing()
        finally:
            self._threads.close()

    def keep(self, case: Case, path: Path) -> None:
        """Take a case whose label map is there."""
        self._done(CaseResult(case.name, path, kept=True))

    def put(self, case: Case, path: Path) -> None:
        """Take a case that is to be predicted."""
        try:
            job = self._job(case, path)
        except Exception as error:
            self._done(CaseResult(case.name, path, error=error))
            return
        self._compute(following=job)

    def _job(self, case: Case, path: Path) -> Job:
        files = ImageFiles.judged(case.images, name=case.name)
        most = max(label.value for label in self._runs[0].plan.labels)
        label_bytes = np.min_scalar_type(most).itemsize
        return Job(
            case,
            files,
            path,
            peak_bytes=forecast(
                self._runs,
                files.grid,
                device=self._device,
                files_bytes=files_bytes(files, path, label_bytes),
            ).peak_bytes,
            image_bytes=4 * files.n_channels * files.grid.n_voxels,
            label_bytes=files.grid.n_voxels * label_bytes,
        )

    def _compute(self, *, following: Job | None) -> None:
        """Predict the next case, with the one that follows it in view."""
        job, self._next = self._next, following
        if job is None:
            return
        try:
            image = self._image_of(job)
            beside_bytes = 0 if image is None else image.array.nbytes
            beside_bytes += self._written_bytes(job.peak_bytes + beside_bytes)
            later_bytes = 0
            if following is not None:
                later_bytes = following.peak_bytes
                if (
                    self._reads_ahead
                    and self._fits(job.peak_bytes + beside_bytes + following.reading_bytes)
                    and self._fits(following.peak_bytes + following.image_bytes)
                ):
                    self._reading = self._reader.submit(read_image, following.case)
                    beside_bytes += following.reading_bytes
                    later_bytes += following.image_bytes
            behind = (
                self._writes_behind
                and following is not None
                and self._fits(later_bytes + job.label_bytes)
            )
            try:
                labels = self._predict(
                    job,
                    job.files if image is None else image,
                    out=None if behind else job.path,
                    beside_bytes=beside_bytes,
                )
            except MemoryBudgetError:
                if beside_bytes == 0:
                    raise
                del image  # alone it may fit
                behind = False
                self._forget_reading()
                self._finish_writing()
                labels = self._predict(job, job.files, out=job.path, beside_bytes=0)
        except Exception as error:
            self._finish_writing()
            self._done(CaseResult(job.case.name, job.path, error=error))
            return
        self._finish_writing()
        if behind:
            self._written = (job, self._writer.submit(write_volume, labels, job.path))
        else:
            self._done(CaseResult(job.case.name, job.path))

    def _predict(
        self, job: Job, image: ImageFiles | Volume, *, out: Path | None, beside_bytes: int
    ) -> Volume:
        return self._predict_one(
            image,
            out=out,
            memory=None if self._budget_bytes is None else self._budget_bytes - beside_bytes,
            progress=self._within(job),
        )

    def _forget_reading(self) -> None:
        """Let go of the image that is read ahead: it will be read in its turn."""
        if self._reading is not None:
            self._reading.exception()  # waits
            self._reading = None

    def _image_of(self, job: Job) -> Volume | None:
        """The image that was read ahead; None where none was, or it is larger than was thought."""
        reading, self._reading = self._reading, None
        if reading is None:
            return None
        image = reading.result()
        return image if self._fits(job.peak_bytes + image.array.nbytes) else None

    def _written_bytes(self, held_bytes: int) -> int:
        """What the label map that is being written holds; nothing, once it had to be waited for."""
        if self._written is None:
            return 0
        n_bytes = self._written[0].label_bytes
        if self._fits(held_bytes + n_bytes):
            return n_bytes
        self._finish_writing()
        return 0

    def _fits(self, held_bytes: int) -> bool:
        return self._budget_bytes is None or held_bytes <= self._budget_bytes

    def _finish_writing(self) -> None:
        if self._written is None:
            return
        (job, written), self._written = self._written, None
        try:
            written.result()
        except Exception as error:
            self._done(CaseResult(job.case.name, job.path, error=error))
        else:
            self._done(CaseResult(job.case.name, job.path))

    def _done(self, result: CaseResult) -> None:
        if result.error is not None:
            _let_go(result.error)
        self.results.append(result)
        self._report(result)
        self._progress(len(self.results), result.name)

    def _within(self, job: Job) -> Callable[[int, int], None]:
        """The progress of one case of several, from its windows."""
        done = len(self.results) + (self._written is not None)
        return lambda windows, total: self._progress(done + windows / total, job.case.name)


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold, such as an image; the lines it names stay."""
    while error is not None:
        if error.__traceback__ is not None:
            # the first frame is still under way here, and could not be cleared
            error.__traceback__ = error.__traceback__.tb_next
            traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
