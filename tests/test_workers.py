"""The processes that read images: what ends them, and what they survive."""

import errno
import gc
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, fail, run_process
from tests.streams import epoch_of, same, stream_tree, streamed
from utils.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_do_not_depend_on_how_processes_start(tmp_path, method):
    paths, others = stream_tree(tmp_path / "set", count=2), set(multiprocessing.active_children())
    epoch_of(streamed(paths, workers=1))  # from now on PyTorch handles SIGCHLD
    batches = streamed(paths, workers=1)
    batches.loader.multiprocessing_context = method
    assert same(epoch_of(batches)[0], epoch_of(streamed(paths))[0])
    del batches
    gc.collect()
    assert set(multiprocessing.active_children()) <= others  # else this process would wait for them when it ends


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_machine_is_no_damage(tmp_path, workers):
    def fail(path, seed):
        raise OSError(errno.EMFILE, "Too many open files")

    batches = streamed(stream_tree(tmp_path / "set"), workers=workers)
    batches.loader.dataset.crop = fail
    with pytest.raises(UserError, match=r"^reading images fails: .*Too many open files$"):
        list(batches)


def test_workers_of_an_evaluation_end_with_it(tmp_path):
    paths, others = stream_tree(tmp_path / "set"), set(multiprocessing.active_children())
    batches = streamed(paths, training=False, workers=1)
    list(batches)
    assert set(multiprocessing.active_children()) <= others
    broken_off = iter(batches)
    next(broken_off)
    assert set(multiprocessing.active_children()) - others
    broken_off.close()
    assert set(multiprocessing.active_children()) <= others


DEADLY_READING = """
import os, signal, sys
from tests.streams import streamed
from utils.setup import run_script

batches = streamed(sys.argv[1:], workers=1)
batches.loader.dataset.crop = lambda path, seed: os.kill(os.getpid(), signal.SIGKILL)
run_script(lambda: list(batches))
"""


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_in_one_line(tmp_path):
    """As when memory runs out while an image is decoded."""
    (tmp_path / "script.py").write_text(DEADLY_READING)
    paths = stream_tree(tmp_path / "set")
    assert "try fewer --workers" in fail(tmp_path / "script.py", *paths, run=run_process, PYTHONPATH=str(ROOT))


FEW_FILES = """
import errno, sys
from multiprocessing import Process
from tests.streams import streamed
from utils.setup import run_script

def start(process, started=[], start=Process.start):
    if started:
        raise OSError(errno.EMFILE, "Too many open files")
    started.append(process)
    start(process)

Process.start = start
run_script(lambda: list(streamed(sys.argv[1:], workers=2)))
"""


@pytest.mark.slow
def test_a_run_that_cannot_start_all_of_its_workers_ends(tmp_path):
    """In one line, without waiting for those that it started."""
    (tmp_path / "script.py").write_text(FEW_FILES)
    paths = stream_tree(tmp_path / "set")
    error = fail(tmp_path / "script.py", *paths, run=run_process, PYTHONPATH=str(ROOT))
    assert error == "error: reading images fails: [Errno 24] Too many open files"


ENDING = """
import sys, time
from multiprocessing import active_children
from torch.utils.data import _utils
from tests.streams import streamed
from utils.interruption import interruption

interruption.catch()
_utils.MP_STATUS_CHECK_INTERVAL = 0.1  # seconds to wait for a worker
end, *paths = sys.argv[1:]
training, evaluation = streamed(paths, workers=1), streamed(paths, training=False, workers=1)
iterators = [iter(training), evaluation._loaded(), evaluation._loaded()]
for iterator in iterators:
    next(iterator)

stuck = streamed(paths, training=False, workers=1)
stuck.loader.dataset.crop, stuck.loader.timeout = lambda path, seed: time.sleep(1000), 0.1
try:
    next(stuck._loaded())
except RuntimeError as error:
    kept = error  # with its traceback, and thus the iterator

del training, evaluation
print(*(process.pid for process in active_children()), flush=True)
exec(end)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["sys.exit(3)", "raise ValueError"])
def test_no_worker_outlives_its_process_or_keeps_it_from_ending(tmp_path, end):
    """Of iterators that are open, also twice at once, or whose worker is stuck; all of them have SIGTERM blocked."""
    paths = stream_tree(tmp_path / "set")
    command = [sys.executable, "-W", "ignore", "-c", ENDING, end, *map(str, paths)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == (3 if "exit" in end else 1), result.stderr
    workers = result.stdout.split()
    assert len(workers) == 4, result.stderr
    assert not [worker for worker in workers if Path("/proc", worker).exists()]
