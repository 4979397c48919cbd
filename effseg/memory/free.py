"""What `memory="auto"` means: what is free now, where a computation is to run, less a margin."""

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from effseg.devices import device_kind, present_device
from effseg.errors import MemoryBudgetError
from effseg.plans import format_bytes, parse_bytes

AUTO = "auto"
HOST_MARGIN, HOST_MARGIN_BYTES = 0.10, 256 * 2**20
"""Left free on a CPU: half of it because resident memory is predicted to 5 %, the rest because
other processes grow and a system without free pages is slow long before it refuses one."""
CARD_MARGIN, CARD_MARGIN_BYTES = 0.05, 512 * 2**20
"""Left free on a card: predictions are as good, and hardly anything else grows there; but a context
of CUDA takes some hundred MiB, and whether ours is counted as used already nobody says."""
SHARED = Path("/dev/shm")  # noqa: S108 - nothing is written there by name
"""Where Linux keeps the memory that processes share."""
NO_LIMIT = 2**60
"""A control group's limit beyond this is none: its first version says 2^63 less a page."""
UNKNOWN_SHARE = 0.5
"""Of all memory, where the system does not say how much of it is free (macOS)."""


@dataclass(frozen=True)
class Free:
    """Memory that may be taken.

    Attributes:
        bytes: of it, the margin left out.
        why: what set it, in one clause.
    """

    bytes: int
    why: str


@dataclass(frozen=True)
class System:
    """Where an operating system says what is free.

    Attributes:
        proc: of Linux, where its processes and its memory are told.
        cgroup: where its control groups are.
    """

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")


def parse_budget(text: str | int, *devices: str) -> tuple[int, str]:
    """Turn a memory budget into bytes: a size as of `parse_bytes`, or "auto".

    Args:
        text: what was given.
        devices: where it is to hold, "cpu" or "cuda:1"; of several, "auto" is the least.

    Returns:
        Bytes, and in one clause where they come from.

    Raises:
        PlanError: if it is no budget, or is "auto" and a device is not here.
        MemoryBudgetError: if it is "auto" and nothing is free.
    """
    if isinstance(text, str) and text.strip().lower() == AUTO:
        least = min((free_bytes(device) for device in devices), key=lambda free: free.bytes)
        return least.bytes, least.why
    return parse_bytes(text), "as asked"


def free_bytes(device: str, *, system: System | None = None) -> Free:
    """How much memory may be taken on a device now.

    On a CPU the least of what the system, the control groups of this process (a container's limit
    is one) and the limit on its addresses leave. Pages of files that a group has not used lately
    count as free, since they are given up first.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        system: where to ask about a CPU; None: this one.

    Raises:
        PlanError: if effseg does not run on such a device, or it is not here.
        MemoryBudgetError: if no more than the margin is free.
    """
    if device_kind(device) == "cuda":
        n_free, n_all = torch.cuda.mem_get_info(present_device(device))
        found = Free(n_free, f"of the {format_bytes(n_all)} of {device}")
        return _less_margin(found, CARD_MARGIN, CARD_MARGIN_BYTES)
    least = min(_limits(system or System()), key=lambda free: free.bytes)
    return _less_margin(least, HOST_MARGIN, HOST_MARGIN_BYTES)


def shared_bytes(folder: Path = SHARED) -> int | None:
    """What is free of the memory that processes share; None where it has no limit of its own.

    A container has 64 MiB of it unless it is asked for more (docker run --shm-size), and a process
    that writes beyond is killed.
    """
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _less_margin(found: Free, share: float, least: int) -> Free:
    margin = max(round(share * found.bytes), least)
    words = f"{format_bytes(max(found.bytes, 0))} free {found.why}"
    if found.bytes <= margin:
        raise MemoryBudgetError(
            f'memory "auto": {words}, of which {format_bytes(margin)} are left alone; end what '
            "takes it, or name a budget yourself"
        )
    said = f"{share:.0%}" if margin > least else format_bytes(margin)
    return Free(found.bytes - margin, f"{words}, less {said}")


def _limits(system: System) -> Iterator[Free]:
    """What each of those who limit a process leaves it, the margin not yet taken."""
    yield _machine(system)
    yield from _groups(system)
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _first_number(system.proc / "self" / "statm")
    if most != resource.RLIM_INFINITY and used is not None:
        left = most - used * resource.getpagesize()
        yield Free(left, f"of the {format_bytes(most)} of addresses (ulimit -v)")


def _machine(system: System) -> Free:
    stated = _table(system.proc / "meminfo")
    if "MemAvailable" in stated:
        most = stated.get("MemTotal", 0) * 1024
        return Free(stated["MemAvailable"] * 1024, f"of this machine's {format_bytes(most)}")
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Free(
        round(UNKNOWN_SHARE * most),
        f"if half of this machine's {format_bytes(most)} is, which it does not say",
    )


def _groups(system: System) -> Iterator[Free]:
    """Of both versions of control groups, those that limit this process's memory."""
    try:
        lines = (system.proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # the second version; where both are used it may lie beside the first
            for root in (system.cgroup, system.cgroup / "unified"):
                yield from _limited(root, path, ("memory.high", "memory.max"), "memory.current")
        elif "memory" in controllers.split(","):
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            yield from _limited(system.cgroup / "memory", path, (limit,), used)


def _limited(root: Path, path: str, limits: tuple[str, ...], used: str) -> Iterator[Free]:
    """The limits of a group and of all above it, whose files may not be visible from within."""
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        now = _first_number(group / used)
        for limit in limits:
            most = _first_number(group / limit)
            if most is not None and now is not None and most < NO_LIMIT:
                stat = _table(group / "memory.stat")
                # the first version tells a group's own pages apart from those of groups below
                files = stat.get("total_inactive_file", stat.get("inactive_file", 0))
                left = most - max(now - files, 0)
                yield Free(left, f"of this container's {format_bytes(most)}")
        if group == root:
            return


def _first_number(path: Path) -> int | None:
    """The number a file begins with; None where it says "max", or there is no file."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return int(words[0]) if words and words[0].isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Names and numbers, one pair a line; empty where there is no file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {
        words[0].rstrip(":"): int(words[1])
        for words in lines
        if len(words) > 1 and words[1].isdecimal()
    }
