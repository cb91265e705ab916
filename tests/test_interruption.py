"""Runs that are killed, interrupted, started twice, or out of space, and what they leave."""

import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
from data.streaming import Order
from tests.helpers import BUDGET, ROOT, assert_same_run, content_of, fail, make_tree, succeed

SMALL = ("--dataset", "digits", "--teacher_model", "resnet_20", "--num_students", 2, "--train_batch_size", 32)
SMALL += ("--num_epochs", 2, "--lr", 0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The job_dir of a run that nothing interrupted."""
    job = tmp_path_factory.mktemp("whole") / "job"
    succeed("main.py", *SMALL, "--job_dir", job)
    return job


class Run:
    """A script in a process of its own, group and session included, that can be watched and sent signals."""

    def __init__(self, script, *flags):
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / script), *map(str, flags)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, text):
        """Wait until a line of its output contains `text`."""
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"it ended without '{text}': {self.process.stderr.read()}")

    def end(self, number):
        """Send a signal to the whole group, as a terminal does. Returns the exit code and standard error."""
        os.killpg(self.process.pid, number)
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


# --- killed


def temporary_of_last(job):
    return next((job / "checkpoint").glob(".last.pt.*.tmp"), None)


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_ends_as_one_that_never_was(whole, tmp_path):
    """SIGKILL several times: in turn while a checkpoint is being written, and at a random time after such a write."""
    chance, job = random.Random(0), tmp_path / "job"
    flags = (*SMALL, "--save_every_minutes", 1e-5, "--resume", "--job_dir", job)
    last, positions = job / "checkpoint" / "last.pt", []
    for kill in range(int(4 * BUDGET)):
        process = Run("main.py", *flags).process
        seen = last.stat().st_mtime_ns if last.exists() else 0
        while not temporary_of_last(job):
            assert process.poll() is None, process.stderr.read()
        if kill % 2:
            while not last.exists() or last.stat().st_mtime_ns == seen:
                assert process.poll() is None, process.stderr.read()
            time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
        if last.exists():
            content = content_of(last)
            positions.append((content["epoch"], content["progress"]["position"] if content["progress"] else 0))
    assert positions == sorted(positions)
    assert len(set(positions)) > 1  # it did go on, and from within epochs
    succeed("main.py", *flags)
    assert_same_run(whole, job)
    assert not temporary_of_last(job)


# --- interrupted


def one_line(stderr):
    assert len(stderr.splitlines()) == 1, stderr
    return stderr.strip()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_run_goes_on_with_the_command_that_it_prints(whole, tmp_path, number, code):
    """The command is run by a shell as it is, from a run with --reset and with a name that has to be quoted."""
    job = tmp_path / "it's a job"
    run = Run("main.py", *SMALL, "--reset", "--print_freq", 1, "--job_dir", job)
    run.wait_for("epoch 2/2, step 5/41")
    returncode, stderr = run.end(number)
    assert returncode == code, stderr
    line = one_line(stderr)
    assert line.startswith(f"interrupted by {number.name}: epoch 2/2, step ")
    assert not (job / "lock").exists()
    saved = content_of(job / "checkpoint" / "last.pt")
    assert saved["epoch"] == 1
    assert f"step {saved['progress']['position']}/41 is saved" in line
    assert 5 <= saved["progress"]["position"] < 41
    command = line.split("continue with: ")[1]
    assert shlex.split(command)[0] == sys.executable
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as the run before had
    result = subprocess.run(command, shell=True, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=True)
    assert f"resuming after epoch 1 and {saved['progress']['position']} steps of the next" in result.stdout
    assert_same_run(whole, job)


@pytest.mark.slow
def test_signal_during_an_evaluation_loses_nothing(tmp_path):
    """Neither does SIGKILL then: last.pt has the whole epoch, and the evaluation follows when the run is resumed."""
    flags = (*SMALL, "--train_size", 64, "--val_size", 400, "--eval_batch_size", 1, "--num_epochs", 1)
    succeed("main.py", *flags, "--job_dir", tmp_path / "whole")
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        job = tmp_path / number.name
        last = job / "checkpoint" / "last.pt"
        run = Run("main.py", *flags, "--job_dir", job)
        while not last.exists():
            assert run.process.poll() is None, run.process.stderr.read()
            time.sleep(0.01)
        returncode, stderr = run.end(number)
        assert returncode == code, stderr
        saved = content_of(last)
        assert (saved["epoch"], saved["progress"]["sizes"].tolist(), saved["scores"]) == (0, [32, 32], None)
        assert not (job / "checkpoint" / "model_best.pt").exists()
        assert "resuming after epoch 0 and 2 steps" in succeed("main.py", *flags, "--resume", "--job_dir", job)
        assert_same_run(tmp_path / "whole", job)
    assert one_line(stderr).startswith("interrupted by SIGTERM: epoch 1/1 is saved, not evaluated; continue")


@pytest.mark.slow
def test_finetune_killed_before_its_first_epoch_was_done_can_be_resumed(runs, tmp_path):
    """The student that it started from may be the best, and is evaluated again."""
    job = tmp_path / "job"
    last = job / "checkpoint" / "last.pt"
    run = Run("finetune.py", *runs.refine_flags, "--job_dir", job)
    while not last.exists():
        assert run.process.poll() is None, run.process.stderr.read()
        time.sleep(0.01)
    run.end(signal.SIGKILL)
    assert content_of(last)["epoch"] == 0
    succeed("finetune.py", *runs.refine_flags, "--resume", "--job_dir", job)
    assert_same_run(runs.refined, job)


@pytest.mark.slow
def test_command_to_go_on_after_a_run_resumed_from_a_file(whole, tmp_path):
    """The file's checkpoint is taken over at once: the job_dir's own is what a bare --resume finds from then on."""
    job, source = tmp_path / "job", whole / "checkpoint" / "last.pt"
    run = Run("main.py", *SMALL, "--resume", source, "--lr_decay_step", 1, 2, "--num_epochs", 9, "--job_dir", job)
    run.wait_for("resuming after epoch 2")
    returncode, stderr = run.end(signal.SIGTERM)
    assert returncode == 143, stderr
    words = shlex.split(one_line(stderr).split("continue with: ")[1])
    assert words[-1] == "--resume"
    assert str(source) not in words
    last = content_of(job / "checkpoint" / "last.pt")
    assert (last["epoch"], bool(last["progress"])) >= (2, False)
    assert (job / "metrics.jsonl").read_text().startswith((whole / "metrics.jsonl").read_text())


@pytest.mark.slow
def test_interruption_before_training_changes_nothing(tmp_path):
    make_tree(tmp_path / "set", count=300)
    run = Run("main.py", "--dataset", "folder", "--data_dir", tmp_path / "set", "--job_dir", tmp_path / "job")
    run.wait_for("decoding")
    returncode, stderr = run.end(signal.SIGINT)
    assert (returncode, stderr) == (130, "interrupted by SIGINT: nothing was changed\n")
    assert not (tmp_path / "job").exists()


@pytest.mark.slow
def test_interruption_after_training_says_so(whole, tmp_path):
    job = tmp_path / "job"
    run = Run("main.py", *SMALL, "--job_dir", job)
    run.wait_for("epoch 2/2: loss")
    returncode, stderr = run.end(signal.SIGTERM)
    assert returncode == 143, stderr
    assert one_line(stderr).startswith("interrupted by SIGTERM: training is complete, its report is not; continue with")
    succeed("main.py", *SMALL, "--resume", "--job_dir", job)
    assert_same_run(whole, job)


@pytest.mark.slow
def test_interrupted_streaming_run_and_its_workers_end_quietly_and_can_be_resumed(tmp_path):
    """A batch of the epoch's middle is damaged as a whole: steps and batches are not the same number from there on."""
    make_tree(tmp_path / "set", count=50, size=(40, 40))
    flags = ("--dataset", "folder", "--data_dir", tmp_path / "set", "--image_size", 32, "--val_size", 0.1, "--pretrain")
    flags += ("--teacher_model", "resnet_20", "--train_batch_size", 2, "--num_epochs", 1, "--workers", 2)
    order = Order(90, 2, seed=0)
    order.epoch = 1
    train = data.load("folder", tmp_path / "set", 0.1, image_size=32).train
    for index, _ in list(order)[9]:
        Path(os.fsdecode(train.images[index])).write_bytes(b"")
    succeed("main.py", *flags, "--job_dir", tmp_path / "whole")
    run = Run("main.py", *flags, "--print_freq", 1, "--job_dir", tmp_path / "job")
    run.wait_for("epoch 1/1, step 12/45")
    os.killpg(run.process.pid, signal.SIGINT)
    returncode, stderr = run.end(signal.SIGUSR1)  # a scheduler's warning changes nothing
    assert returncode == 130, stderr
    one_line(stderr)
    progress = content_of(tmp_path / "job" / "checkpoint" / "last.pt")["progress"]
    assert progress["position"] == len(progress["sizes"]) + 1
    succeed("main.py", *flags, "--resume", "--job_dir", tmp_path / "job")
    weights = [content_of(tmp_path / job / "checkpoint" / "last.pt")["model"] for job in ("whole", "job")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "job" / "metrics.jsonl").read_text()


# --- started twice


@pytest.mark.slow
def test_second_run_in_a_job_dir_is_refused(tmp_path):
    job = tmp_path / "job"
    run = Run("main.py", *SMALL, "--num_epochs", 1000, "--job_dir", job)
    run.wait_for("epoch 1/1000")
    for more in ((), ("--resume",), ("--reset",)):
        error = fail("main.py", *SMALL, *more, "--job_dir", job)
        assert f"{job} is in use by process {run.process.pid} on {socket.gethostname()}" in error
    run.process.kill()
    run.process.communicate()
    assert (job / "lock").exists()
    succeed("main.py", *SMALL, "--num_epochs", 1, "--reset", "--job_dir", job)
    assert not (job / "lock").exists()


# --- out of space

LIMITED = """
import resource, runpy, signal, sys

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size, *sys.argv = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 2_000, 200_000])
def test_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(whole, tmp_path, size):
    """A limit on the size of files stands in for the disk: too small for the log, the events, or a checkpoint."""
    job = tmp_path / "job"
    shutil.copytree(whole, job)
    before = (job / "checkpoint" / "last.pt").read_bytes()
    flags = map(str, [*SMALL, "--lr_decay_step", 1, 2, "--num_epochs", 4, "--resume", "--job_dir", job])
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), "main.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert re.match(r"error: .*File too large", one_line(result.stderr))
    assert (job / "checkpoint" / "last.pt").read_bytes() == before
    assert not list(job.rglob("*.tmp"))
