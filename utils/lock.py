"""One run at a time in a folder."""

import atexit
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError


class Lock:
    """A file with the process and host of the run that uses the folder, locked for as long as that process lives.

    The system drops the lock with the process, however it ends, so that what a killed run on this host left behind is
    taken over. Not every network file system passes locks on to other hosts: theirs is believed for what is in it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[str] | None = None

    def check(self) -> None:
        """Raise a UserError if another process holds the lock; writes nothing."""
        if self.path.exists():
            with open(self.path, encoding="utf-8") as file:
                self._claim(file, fcntl.LOCK_SH)

    def acquire(self) -> None:
        """Take the lock until `release` or the end of the process.

        Raises:
            UserError: another process holds it.
        """
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115, its lock goes when it is closed
            self._claim(file, fcntl.LOCK_EX)
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                break  # and not a file that its owner deleted meanwhile
        self._file = file
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        atexit.register(self.release)

    def release(self) -> None:
        atexit.unregister(self.release)
        if self._file:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _claim(self, file: IO[str], kind: int) -> None:
        local = True
        try:
            # A record lock, not one of flock: that would live on in the processes that read images.
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = "process {pid} on {host}".format(**_owner(file) or {"pid": "?", "host": "?"})
                raise UserError(
                    f"{self.path.parent} is in use by {owner}: wait for its end, end it, or choose another --job_dir"
                ) from error
            local = False  # a file system without locks
        owner = _owner(file)
        if owner and not (local and owner["host"] == socket.gethostname()):
            raise UserError(
                f"{self.path.parent} is in use by process {owner['pid']} on {owner['host']}, as far as can be told "
                f"here: if that process is gone, delete {self.path}"
            )


def _owner(file: IO[str]) -> dict[str, Any] | None:
    """{"pid": ..., "host": ...}; None if the file does not say."""
    file.seek(0)
    try:
        content = json.loads(file.read())
    except ValueError:
        return None
    return content if isinstance(content, dict) and {"pid", "host"} <= content.keys() else None
