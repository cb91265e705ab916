"""How many CPU cores a process should use."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """The cores that this process may run on, no more than its cgroups' CPU quota, shared with torchrun's others.

    Args:
        root: folder with proc/ and sys/.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # on this machine
    return max(1, math.ceil(min([allowed, *_quotas(root)])) // processes)


def _quotas(root: Path) -> Iterator[float]:
    """In cores, of the cgroup of this process and of those above it."""
    with suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version1 = "cpu" in controllers.split(",")
            if version1 or not controllers:
                mount = root / "sys/fs/cgroup" / ("cpu" if version1 else "")
                folder = mount / path.lstrip("/")  # in a container it may be missing below its mount
                for cgroup in (folder, *folder.parents):
                    if cgroup.is_relative_to(mount):
                        yield _quota(cgroup, version1)


def _quota(cgroup: Path, version1: bool) -> float:
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version1 else ("cpu.max",)  # "150000 100000"
    with suppress(OSError, ValueError):  # there is no such file, or the quota is "max"
        quota, period = map(int, " ".join((cgroup / name).read_text() for name in names).split())
        if quota > 0:  # not -1, which is none in version 1
            return quota / period
    return math.inf
