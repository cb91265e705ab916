"""Fixtures of several test files, and a look at what the tests leave behind."""

import gc
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import fused
from tests.helpers import succeed
from tests.training import arguments
from utils.job import Job

torch.set_num_threads(1)  # the tests run side by side


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A pretrained teacher, two students trained with it, and the best of them refined, on the digits."""
    folder = tmp_path_factory.mktemp("runs with space")
    runs = SimpleNamespace(
        teacher=folder / "teacher", students=folder / "students", refined=folder / "refined", folder=folder, output={}
    )
    small = ("--dataset", "digits", "--teacher_model", "resnet_20", "--lr", 0.05)
    runs.student_flags = (*small, "--teacher_dir", runs.teacher, "--num_students", 2, "--num_epochs", 3)
    runs.output["teacher"] = succeed("main.py", *small, "--pretrain", "--num_epochs", 4, "--job_dir", runs.teacher)
    runs.output["students"] = succeed("main.py", *runs.student_flags, "--job_dir", runs.students)
    runs.student_file = runs.students / "resnet_pruned_18.pt"
    runs.refine_flags = ("--refine", runs.student_file, "--pruned", "--num_epochs", 2, "--lr", 0.01)
    runs.output["refined"] = succeed("finetune.py", *runs.refine_flags, "--job_dir", runs.refined)
    return runs


@pytest.fixture
def job(tmp_path):
    """An open job_dir of `arguments()`."""
    job = Job(tmp_path / "job", arguments().recorded())
    job.open(None, epoch=0, reset=False)
    yield job
    job.close()


@pytest.fixture
def kernels():
    """The compiled kernels. Without a compiler there is nothing to test; whoever runs the tests must have one."""
    fused.enable()
    yield
    fused.disable()


def processes_of_the_tests():
    """{pid: command} of the living processes that this one started, and those that they did.

    multiprocessing's helpers of this process are left out: they end when it does.
    """
    started = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            marked = f"STARTED_BY_TESTS={os.getpid()}".encode() in (folder / "environ").read_bytes().split(b"\0")
            own = int(parent) == os.getpid()
            helper = own and ("multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command)
            if (own or marked) and state != "Z" and not helper:
                started[int(folder.name)] = command
    return started


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_running():
    """Whoever reads this process's output to its end would wait for processes that a test or the product left."""
    os.environ["STARTED_BY_TESTS"] = str(os.getpid())
    yield
    gc.collect()
    deadline = time.monotonic() + 15  # a process that reads images looks for its parent every five seconds
    while True:
        threads = [thread.name for thread in threading.enumerate() if not thread.daemon]
        threads.remove(threading.main_thread().name)
        processes = processes_of_the_tests()
        if not (threads or processes) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    for pid in processes:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    assert not processes, "tests left processes running"
    assert not threads, "tests left threads running"
