"""What is free, on machines that are made up as folders."""

import resource
from pathlib import Path

import pytest
import torch

from effseg.errors import MemoryBudgetError, PlanError
from effseg.memory import free, free_bytes, parse_budget, shared_bytes
from effseg.memory.free import CARD_MARGIN_BYTES, HOST_MARGIN_BYTES, System

GIB = 2**30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """A machine of 64 GiB of which 40 are available, without control groups or limits."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    made = System(proc=tmp_path / "proc", cgroup=tmp_path / "cgroup")
    write(made.proc / "meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {40 * 2**20} kB\n")
    return made


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder: Path, *, most: object, used: int, files: int = 0) -> None:
    """A control group of the second version."""
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 7\ninactive_file {files}\nactive_file 9\n")


def test_a_bare_machine_has_what_it_says_less_a_tenth(system: System) -> None:
    found = free_bytes("cpu", system=system)
    assert found.bytes == 36 * GIB
    assert found.why == "40.00 GiB free of this machine's 64.00 GiB, less 10%"


def test_a_container_has_its_limit_less_what_is_used_but_for_idle_files(system: System) -> None:
    write(system.proc / "self" / "cgroup", "0::/\n")
    group(system.cgroup, most=16 * GIB, used=6 * GIB, files=2 * GIB)
    found = free_bytes("cpu", system=system)
    assert found.bytes == round(0.9 * 12 * GIB)
    assert found.why == "12.00 GiB free of this container's 16.00 GiB, less 10%"


def test_the_tightest_group_on_the_way_up_counts(system: System) -> None:
    write(system.proc / "self" / "cgroup", "0::/pods/one/job\n")
    group(system.cgroup / "pods" / "one" / "job", most="max", used=GIB)
    group(system.cgroup / "pods" / "one", most=10 * GIB, used=4 * GIB)
    group(system.cgroup / "pods", most=30 * GIB, used=25 * GIB)
    assert free_bytes("cpu", system=system).bytes == round(0.9 * 5 * GIB)
    write(system.cgroup / "pods" / "one" / "job" / "memory.high", f"{4 * GIB}\n")
    assert free_bytes("cpu", system=system).bytes == round(0.9 * 3 * GIB)


def test_a_group_that_cannot_be_seen_from_within_leaves_those_that_can(system: System) -> None:
    write(system.proc / "self" / "cgroup", "0::/docker/4f2a\n")
    group(system.cgroup, most=8 * GIB, used=0)
    assert free_bytes("cpu", system=system).bytes == round(0.9 * 8 * GIB)


def test_the_first_version_of_control_groups_counts_too(system: System) -> None:
    write(system.proc / "self" / "cgroup", "4:cpu,cpuacct:/\n3:memory:/job\n0::/\n")
    job = system.cgroup / "memory" / "job"
    write(job / "memory.limit_in_bytes", f"{9 * GIB}\n")
    write(job / "memory.usage_in_bytes", f"{5 * GIB}\n")
    write(job / "memory.stat", f"inactive_file 0\ntotal_inactive_file {GIB}\n")
    write(system.cgroup / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(system.cgroup / "memory" / "memory.usage_in_bytes", f"{5 * GIB}\n")
    found = free_bytes("cpu", system=system)
    assert found.bytes == round(0.9 * 5 * GIB)
    assert "this container's 9.00 GiB" in found.why


def test_a_limit_on_addresses_counts_without_what_is_mapped(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * GIB, 8 * GIB))
    write(system.proc / "self" / "statm", f"{3 * GIB // resource.getpagesize()} 1 1 1 0 1 0\n")
    found = free_bytes("cpu", system=system)
    assert found.bytes == round(0.9 * 5 * GIB)
    assert "ulimit -v" in found.why


def test_the_margin_is_never_less_than_what_others_need(system: System) -> None:
    write(system.proc / "self" / "cgroup", "0::/\n")
    group(system.cgroup, most=GIB, used=0)
    found = free_bytes("cpu", system=system)
    assert found.bytes == GIB - HOST_MARGIN_BYTES
    assert found.why.endswith("less 256 MiB")


def test_nothing_free_is_said_in_one_line(system: System) -> None:
    write(system.proc / "self" / "cgroup", "0::/\n")
    group(system.cgroup, most=4 * GIB, used=5 * GIB)  # limits can be lowered below what is used
    with pytest.raises(MemoryBudgetError, match="0 B free of this container's") as caught:
        free_bytes("cpu", system=system)
    assert "\n" not in str(caught.value)


def test_a_system_that_says_nothing_has_half_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    pages = {"SC_PHYS_PAGES": 2**22, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(free.os, "sysconf", pages.__getitem__)
    found = free_bytes("cpu", system=System(proc=tmp_path / "no", cgroup=tmp_path / "none"))
    assert found.bytes == round(0.9 * 8 * GIB)
    assert "does not say" in found.why


def test_this_machine_has_something_free() -> None:
    found = free_bytes("cpu")
    assert 0 < found.bytes < 2**50


def test_a_card_says_what_is_free_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index * 20 * GIB, 2**36))
    assert free_bytes("cuda:1").bytes == 19 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 2**36))
    assert free_bytes("cuda").bytes == 4 * GIB - CARD_MARGIN_BYTES


def test_auto_is_the_least_of_the_devices_it_is_for(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free, "System", lambda: system)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    assert parse_budget(" Auto ", "cpu")[0] == parse_budget("auto", "cpu", "cuda")[0] == 36 * GIB
    n_bytes, why = parse_budget("auto", "cuda")
    assert n_bytes == 57 * GIB
    assert why == "60.00 GiB free of the 80.00 GiB of cuda, less 5%"


def test_sizes_are_sizes() -> None:
    assert parse_budget("8GB ", "cpu") == (8 * 10**9, "as asked")
    assert parse_budget("1 MiB", "cuda") == (2**20, "as asked")


@pytest.mark.parametrize("text", ["lots", "0", "-1", "", "autos", "auto 8GiB"])
def test_what_is_no_budget_is_told_what_is_one(text: str) -> None:
    with pytest.raises(PlanError, match=r'8GiB.*"auto"') as caught:
        parse_budget(text, "cpu")
    assert "\n" not in str(caught.value)


def test_auto_for_a_card_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PlanError, match="0 CUDA devices here"):
        parse_budget("auto", "cuda")


def test_shared_memory_has_a_limit_where_it_is_a_file_system(tmp_path: Path) -> None:
    n_bytes = shared_bytes(tmp_path)
    assert n_bytes is not None
    assert n_bytes > 0
    assert shared_bytes(tmp_path / "none") is None
