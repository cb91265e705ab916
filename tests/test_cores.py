"""The cores that a process should use."""

import os

import pytest
import torch

from utils.device import Execution, apply_execution, contention, cores

SET_AFFINITY, GET_AFFINITY = (getattr(os, f"sched_{name}affinity", None) for name in ("set", "get"))
CPU, V2 = "sys/fs/cgroup/cpu", "sys/fs/cgroup"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def quota(folder, microseconds, period=100_000):
    return {f"{folder}/cpu.cfs_quota_us": f"{microseconds}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (None, {}, 8),  # not Linux
        ("0::/\n", {}, 8),
        ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {f"{V2}/cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {f"{V2}/cpu.max": "2000000 100000\n"}, 8),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a\n", {f"{V2}/cpu.max": "garbage\n"}, 8),
        ("4:cpu,cpuacct:/a\n0::/\n", quota(f"{CPU}/a", 200_000), 2),
        ("4:cpu,cpuacct:/a\n", quota(f"{CPU}/a", -1), 8),
        ("4:cpu,cpuacct:/docker/1\n3:cpuset:/docker/1\n", quota(CPU, 50_000, 20_000), 3),  # mounted at the container's
    ],
)
def test_cores_follow_the_quota_of_the_cgroups(tmp_path, cgroup, files, expected):
    for name, content in (files | ({"proc/self/cgroup": cgroup} if cgroup else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores(tmp_path) == expected


@pytest.mark.parametrize(("processes", "expected"), [("", 8), ("1", 8), ("3", 2), ("20", 1)])
def test_processes_of_torchrun_share_the_cores(tmp_path, monkeypatch, processes, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores(tmp_path) == expected


def test_threads_follow_the_cores_unless_a_number_was_set(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        apply_execution(Execution())
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        apply_execution(Execution())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(SET_AFFINITY is None, reason="Linux only")
def test_threads_that_do_not_get_the_time_of_their_cores_are_named(monkeypatch):
    """Two threads on one core."""
    before, allowed = torch.get_num_threads(), GET_AFFINITY(0)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    device = torch.device("cpu")
    try:
        torch.set_num_threads(2)
        torch.zeros(2**16).add_(1)  # starts them
        for thread in os.listdir("/proc/self/task"):
            SET_AFFINITY(int(thread), {min(allowed)})
        (line,) = contention(device)
        assert "OMP_NUM_THREADS=1" in line
        torch.set_num_threads(1)
        assert contention(device) == []
    finally:
        torch.set_num_threads(before)
        for thread in os.listdir("/proc/self/task"):
            SET_AFFINITY(int(thread), allowed)
