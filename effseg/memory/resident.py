"""What the operating system says this process holds: the check on every count of tensor bytes."""

import resource
import sys
import threading
from pathlib import Path
from typing import Self

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to clear_refs, it resets VmHWM (Linux, Documentation/filesystems/proc.rst)."""
SAMPLE_SECONDS = 0.01


def resident_bytes() -> int:
    """What this process holds in physical memory now.

    Where there is no /proc (macOS), the most it ever held stands in for it.
    """
    return _status_bytes("VmRSS") or _ever_bytes()


def peak_resident_bytes() -> int:
    """The most this process ever held in physical memory, or since the kernel's peak was reset."""
    return _status_bytes("VmHWM") or _ever_bytes()


class PeakResident:
    """The most this process holds in physical memory, above what it held at the start.

    The kernel keeps the peak. Where it may not be reset (some containers), a thread samples every
    10 ms instead; where there is no /proc, only growth beyond the most the process ever held is
    seen. One at a time: a second one resets the first one's peak.

    ```
    resident = PeakResident().start()
    ...
    resident.stop()
    resident.peak_bytes
    ```
    """

    def __init__(self) -> None:
        self.baseline_bytes = 0
        self._peak = 0
        self._sampler: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self) -> Self:
        """Take the baseline and forget earlier peaks."""
        self._stopped.clear()
        reset = _reset_peak()
        self.baseline_bytes = self._peak = resident_bytes()
        if not reset and STATUS.exists():
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def stop(self) -> int:
        """Freeze the peak and return it, in bytes above the baseline."""
        self._look()
        self._stopped.set()
        if self._sampler is not None:
            self._sampler.join()
            self._sampler = None
        return self._peak - self.baseline_bytes

    @property
    def peak_bytes(self) -> int:
        """The most until now, or until `stop`, in bytes above the baseline."""
        if not self._stopped.is_set():
            self._look()
        return self._peak - self.baseline_bytes

    def _look(self) -> None:
        kept = resident_bytes() if self._sampler is not None else peak_resident_bytes()
        self._peak = max(self._peak, kept)

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._look()


def _reset_peak() -> bool:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(next(found, "0")) * 1024


def _ever_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
