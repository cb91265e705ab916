"""Two floors: the ground floor imports nothing of this project but itself, and data/ and model/ build on it.

The upper floor may import both of them and the ground floor; only the scripts import it.
"""

import os
import sys

GROUND_FLOOR = ("errors", "files", "distributed", "normalization", "losses")
UPPER_FLOOR = (
    *("options", "config", "methods", "setup"),  # from the flags to a run
    *("engine", "metrics", "device", "interruption"),  # training
    *("checkpoint", "teacher", "job"),  # files
    *("report", "tables", "export", "cost"),  # results
)

if sys.version_info < (3, 10):  # noqa: UP036, users of an older one get a message
    print(f"error: Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)


def _start_all_threads() -> None:
    """Undo settings that make OpenMP start fewer threads than it announces: oneDNN would wait forever for the others.

    This comes before torch is imported because OpenMP reads them when it is loaded.
    """
    for name in ("OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS"):
        os.environ.pop(name, None)
    limit, threads = (os.environ.get(name, "").split(",")[0] for name in ("OMP_THREAD_LIMIT", "OMP_NUM_THREADS"))
    os.environ.pop("OMP_THREAD_LIMIT", None)
    if limit.isdecimal() and 0 < int(limit) < int(threads if threads.isdecimal() else os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = limit


_start_all_threads()
