"""What a command takes while it runs: its wall clock, and the memory of it and all its workers."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SESSION = 3
"""The session's place in a process's stat, counted behind its name (proc_pid_stat(5))."""
OWN = ("Pss_Anon:", "Pss_Shmem:")
"""What processes wrote, and what they share by /dev/shm: libraries on disk are in neither."""


@dataclass(frozen=True)
class Took:
    """What a command took.

    Attributes:
        seconds: of its wall clock.
        peak_bytes: of memory that it and its processes held at once, as often as it was looked at;
            pages that several hold count once.
    """

    seconds: float
    peak_bytes: int


def watched(
    command: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    pause_seconds: float = 0.5,
) -> Took:
    """Run a command in a session of its own, by which its workers are known, and watch it.

    Args:
        command: and its arguments.
        environment: its variables; None: this process's.
        pause_seconds: between two looks. A look walks through the pages of all processes, so that
            many a second would slow them down.

    Raises:
        CalledProcessError: if it fails.
    """
    arguments = list(map(str, command))
    peak, ended = 0, threading.Event()
    started = time.monotonic()
    with subprocess.Popen(arguments, env=environment, start_new_session=True) as process:

        def look() -> None:
            nonlocal peak
            while not ended.wait(pause_seconds):
                peak = max(peak, session_bytes(process.pid))

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            code = process.wait()
        except BaseException:  # the terminal's signals do not reach another session
            os.killpg(process.pid, signal.SIGTERM)
            raise
        finally:
            ended.set()
            watcher.join()
    if code != 0:
        raise subprocess.CalledProcessError(code, arguments)
    return Took(time.monotonic() - started, peak)


def session_bytes(session: int) -> int:
    """Memory of all processes of a session."""
    return sum(
        own_bytes(folder)
        for folder in PROC.iterdir()
        if folder.name.isdecimal() and _session(folder) == session
    )


def own_bytes(folder: Path) -> int:
    """Memory of one process, by its folder in /proc; none once it has ended."""
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(OWN))


def imported_bytes(python: Path, modules: str) -> int:
    """Memory of an interpreter that has imported modules, and nothing else.

    Args:
        python: the interpreter.
        modules: their names, with commas between.
    """
    code = f"import {modules}; print(open('/proc/self/smaps_rollup').read())"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return 1024 * sum(int(line.split()[1]) for line in said.splitlines() if line.startswith(OWN))


def _session(folder: Path) -> int | None:
    try:
        stat = (folder / "stat").read_text()
    except OSError:
        return None
    # a name in brackets may hold anything, brackets too
    return int(stat.rpartition(")")[2].split()[SESSION])
