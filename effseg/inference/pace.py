"""How many windows a pass should take, told by timing passes that are made anyway."""

import logging
import time
from collections.abc import Callable

from effseg.devices import DeviceKind

logger = logging.getLogger("effseg")

LEAST_WINDOWS: dict[DeviceKind, int] = {"cpu": 2, "cuda": 1}
"""In a pass that is timed. On a CPU torch convolves one small window by other kernels than several,
which are slower and round otherwise; 2 and 4 give the same bits, so that time decides no label."""

MOST_WINDOWS: dict[DeviceKind, int] = {"cpu": 4, "cuda": 16}
"""In a pass that is timed."""

N_TIMED = 2
"""Passes of a size, of which the shortest counts; one before them finds kernels and warms up."""

WORTH = 0.95
"""Of the seconds a window takes: twice as many at once must do with less, or memory is wasted."""


class Pace:
    """Seconds that a window takes in passes of 1, 2, 4, ... windows.

    Each size is tried on windows that are due; what comes of them is used. Twice as many windows
    are tried as long as that pays. Which size wins changes logits by rounding at most, on a CPU not
    at all.

    Args:
        kind: of the device.
    """

    def __init__(self, kind: DeviceKind) -> None:
        self._least = LEAST_WINDOWS[kind]
        self._seconds: dict[int, list[float]] = {}
        self._told: int | None = None

    def windows(self, most: int) -> int:
        """How many windows the next pass should take, of at most so many."""
        size = min(self._least, most)
        while self._is_known(size) and 2 * size <= most:
            if self._is_known(2 * size) and not self._pays(2 * size):
                break
            size *= 2
        if self._is_known(size):
            self._tell(size)
        return size

    def run(self, call: Callable[[], int], n_windows: int, *, wait: Callable[[], None]) -> None:
        """Make a pass, and note how long it took where that is not known yet.

        Args:
            call: makes it; returns how many windows were passed, constant ones being left out.
            n_windows: how many there are.
            wait: returns when the device is done with all it was given.
        """
        if self._is_known(n_windows):
            call()
            return
        wait()
        start = time.perf_counter()
        n_passed = call()
        wait()
        if n_passed == n_windows:
            seconds = (time.perf_counter() - start) / n_windows
            self._seconds.setdefault(n_windows, []).append(seconds)

    def _is_known(self, size: int) -> bool:
        return len(self._seconds.get(size, ())) > N_TIMED

    def _of_window(self, size: int) -> float:
        return min(self._seconds[size][1:])

    def _pays(self, size: int) -> bool:
        return self._of_window(size) <= WORTH * self._of_window(size // 2)

    def _tell(self, size: int) -> None:
        if self._told == size:
            return
        self._told = size
        tried = ", ".join(
            f"{1000 * self._of_window(n):.3g} ms with {n}"
            for n in sorted(self._seconds)
            if self._is_known(n)
        )
        logger.info("%d windows a pass: one takes %s", size, tried)
