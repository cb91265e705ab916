"""Files that are written completely or not at all, and a lock that keeps a second run out of a folder."""

import atexit
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

TOUCHED_EVERY = 60  # seconds between the touches by which the owner of a lock shows that it lives
FRESH = 5 * TOUCHED_EVERY  # seconds after which a lock that was not touched counts as abandoned


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file that replaces `path` once it is complete and on the disk.

    Raises:
        UserError: the file cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}  # names may not be UTF-8
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a read-only file system refuses to delete even what is not there
            temporary.unlink()


def atomic_copy(source: Path, target: Path) -> None:
    """Copy a file; raises as `atomic_write` does."""
    with open(source, "rb") as original, atomic_write(target) as copy:
        shutil.copyfileobj(original, copy)


def delete_unfinished(path: Path) -> None:
    """Delete the temporary files of `path` that killed processes left behind."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink()


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, too, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Lock:
    """A lock file that names the process and host of the run that uses its folder.

    The process locks the file and touches it from time to time. The system drops its lock when it ends, so that a later
    run on this host can take over what a killed run left behind. Some file systems have no locks or do not pass them on
    to other hosts. There, the owner counts as alive while the file is fresh, unless it is a dead process of this host
    or belongs to the same SLURM job, which was then requeued.
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
                break  # its owner did not delete it meanwhile
        self._file = file
        file.truncate(0)
        json.dump(self._me, file)
        file.flush()
        self._released = threading.Event()
        self._toucher = threading.Thread(target=self._keep_fresh, daemon=True)
        self._toucher.start()
        atexit.register(self.release)

    def check_held(self) -> None:
        """Raise a UserError if another run has taken over the lock, which can happen while a process is suspended."""
        owner = _owner(self._file)
        if owner and owner != self._me:
            raise UserError(f"{self.path.parent} was taken over by {_name(owner)}: this run showed no sign of life")

    def release(self) -> None:
        atexit.unregister(self.release)
        if self._file:
            self._released.set()
            self._toucher.join()
            with suppress(OSError):  # the file system may have become read-only
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
            # A record lock: the worker processes that read images would inherit a lock of flock.
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{self.path.parent} is in use by {_name(_owner(file))}: wait for its end, end it, or choose "
                    "another --job_dir"
                ) from error
            has_locks = False
        owner, age = _owner(file), time.time() - os.fstat(file.fileno()).st_mtime
        if owner and age < FRESH and not self._has_ended(owner, has_locks):
            raise UserError(
                f"{self.path.parent} is in use by {_name(owner)}, which showed a sign of life {max(0, age):.0f} s ago: "
                f"if that process is gone, delete {self.path} or wait {FRESH // 60} minutes"
            )

    def _has_ended(self, owner: dict[str, Any], has_locks: bool) -> bool:
        """Whether an owner that does not lock the file is known to have ended."""
        if owner["host"] == self._me["host"]:
            return has_locks or not _is_alive(owner["pid"])
        return "slurm_job_id" in owner and owner["slurm_job_id"] == self._me.get("slurm_job_id")


def _is_alive(pid: int) -> bool:
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
    """The content of a lock file, {"pid": ..., "host": ...}; None if it is malformed."""
    file.seek(0)
    try:
        content = json.loads(file.read())
    except ValueError:
        return None
    if not isinstance(content, dict) or not {"pid", "host"} <= content.keys():
        return None
    return content if type(content["pid"]) is int and content["pid"] > 0 else None
