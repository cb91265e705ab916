"""The lock of a job_dir: of a process that lives, of one that is gone, and of another host."""

import errno
import json
import os
import socket
import subprocess
import time

import pytest

from utils.errors import UserError
from utils.files import FRESH, Lock


def write_owner(path, **owner):
    path.write_text(json.dumps(owner))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_lock_that_says_nothing_is_taken_over(tmp_path, content):
    lock = Lock(tmp_path / "lock")
    lock.path.write_text(content)
    lock.check()
    lock.acquire()
    assert json.loads(lock.path.read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    lock.release()
    assert not lock.path.exists()


def test_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    """Also if its number is now that of another process, such as 1."""
    lock = Lock(tmp_path / "lock")
    write_owner(lock.path, pid=1, host=socket.gethostname())
    lock.check()
    lock.acquire()
    lock.release()


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_lock_of_another_host_is_respected_while_it_is_fresh(tmp_path):
    lock = Lock(tmp_path / "lock")
    write_owner(lock.path, pid=7, host="elsewhere")
    for claim in (lock.check, lock.acquire):
        with pytest.raises(UserError, match=f"process 7 on elsewhere, .*if that process is gone, delete {lock.path}"):
            claim()
    assert json.loads(lock.path.read_text())["host"] == "elsewhere"
    age(lock.path, FRESH + 1)
    lock.check()
    lock.acquire()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()


def test_lock_stays_fresh_while_its_owner_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.files.TOUCHED_EVERY", 0.01)
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    age(lock.path, FRESH + 1)
    for _ in range(200):
        if time.time() - lock.path.stat().st_mtime < FRESH:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it was not touched")
    lock.release()


@pytest.mark.parametrize(("job", "taken_over"), [("5", True), ("6", False), (None, False)])
def test_lock_of_the_same_slurm_job_is_taken_over(tmp_path, monkeypatch, job, taken_over):
    write_owner(tmp_path / "lock", pid=7, host="elsewhere", slurm_job_id="5")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    lock = Lock(tmp_path / "lock")
    if not taken_over:
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            lock.acquire()
        return
    lock.acquire()
    assert json.loads(lock.path.read_text())["slurm_job_id"] == "5"
    lock.release()


def test_owner_notices_that_its_lock_was_taken_over(tmp_path):
    """As after a night's suspension; it does not delete the lock of the run that has the folder now."""
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    os.utime(lock.path, (0, 0))
    lock.renew()
    assert time.time() - lock.path.stat().st_mtime < 60
    write_owner(lock.path, pid=7, host="elsewhere")
    with pytest.raises(UserError, match="taken over by process 7 on elsewhere"):
        lock.renew()
    lock.release()
    assert lock.path.exists()


def test_lock_where_the_file_system_has_none_goes_by_what_it_says(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* delete"):
        Lock(lock.path).check()
    lock.release()
    Lock(lock.path).check()
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_owner(lock.path, pid=ended.pid, host=socket.gethostname())
    lock.acquire()
    lock.release()
