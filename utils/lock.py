"""One run at a time in a folder."""

import atexit
import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

TOUCHED_EVERY = 60  # seconds between the touches by which the owner of a lock shows that it lives
FRESH = 5 * TOUCHED_EVERY  # a lock that was not touched for so long is believed abandoned


class Lock:
    """A file with the process and host of the run that uses the folder, locked and touched while that process lives.

    The system drops the lock with the process, however it ends, so that what a killed run on this host left behind is
    taken over. Not every file system knows locks or passes them on to other hosts: there, the owner is believed to live
    while the file is fresh, unless it is a dead process of this host or the same SLURM job, which has been requeued.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[str] | None = None
        self._me = {"pid": os.getpid(), "host": socket.gethostname()}
        if job := os.environ.get("SLURM_JOB_ID"):
            self._me["slurm_job_id"] = job

    def check(self) -> None:
        """Raise a UserError if another process holds the lock; writes nothing."""
        if self.path.exists():
            with open(self.path, encoding="utf-8", errors="replace") as file:
                self._claim(file, fcntl.LOCK_SH)

    def acquire(self) -> None:
        """Take the lock until `release` or the end of the process.

        Raises:
            UserError: another process holds it.
        """
        while True:
            file = open(self.path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115, closing it drops the lock
            self._claim(file, fcntl.LOCK_EX)
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                break  # and not a file that its owner deleted meanwhile
        self._file = file
        file.truncate(0)
        json.dump(self._me, file)
        file.flush()
        self._released = threading.Event()
        self._toucher = threading.Thread(target=self._keep_fresh, daemon=True)
        self._toucher.start()
        atexit.register(self.release)

    def check_held(self) -> None:
        """Raise a UserError if another run has taken over the lock, as it may after this process was suspended."""
        owner = _owner(self._file)
        if owner and owner != self._me:
            raise UserError(f"{self.path.parent} was taken over by {_name(owner)}: this run showed no sign of life")

    def release(self) -> None:
        atexit.unregister(self.release)
        if self._file:
            self._released.set()
            self._toucher.join()
            with suppress(OSError):  # a file system that has become read-only
                if _owner(self._file) == self._me:
                    self.path.unlink()
            self._file.close()
            self._file = None

    def _keep_fresh(self) -> None:
        while not self._released.wait(TOUCHED_EVERY):
            with suppress(OSError):
                os.utime(self._file.fileno())

    def _claim(self, file: IO[str], kind: int) -> None:
        """Lock the file, or raise a UserError."""
        has_locks = True
        try:
            # A record lock, not one of flock: that would live on in the processes that read images.
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{self.path.parent} is in use by {_name(_owner(file))}: wait for its end, end it, or choose "
                    "another --job_dir"
                ) from error
            has_locks = False
        owner, age = _owner(file), time.time() - os.fstat(file.fileno()).st_mtime
        if owner and age < FRESH and not self._is_gone(owner, has_locks):
            raise UserError(
                f"{self.path.parent} is in use by {_name(owner)}, which showed a sign of life {max(0, age):.0f} s ago: "
                f"if that process is gone, delete {self.path} or wait {FRESH // 60} minutes"
            )

    def _is_gone(self, owner: dict[str, Any], has_locks: bool) -> bool:
        """Whether the owner of a lock that the system would give us is known to have ended."""
        if owner["host"] == self._me["host"]:
            return has_locks or not _is_alive(owner["pid"])
        return "slurm_job_id" in owner and owner["slurm_job_id"] == self._me.get("slurm_job_id")


def _is_alive(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _name(owner: dict[str, Any] | None) -> str:
    return "process {pid} on {host}".format(**owner) if owner else "another process"


def _owner(file: IO[str]) -> dict[str, Any] | None:
    """{"pid": ..., "host": ...}; None if the file does not say."""
    file.seek(0)
    try:
        content = json.loads(file.read())
    except ValueError:
        return None
    if not isinstance(content, dict) or not {"pid", "host"} <= content.keys():
        return None
    return content if type(content["pid"]) is int and content["pid"] > 0 else None
