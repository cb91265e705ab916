"""Atomic writes, the lock of a folder, and dataclasses as plain values in files."""

import atexit
import fcntl
import glob
import json
import os
import re
import socket
import sys
import threading
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Any

import torch
from torch import Tensor

from utils.errors import UserError

TOUCHED_EVERY = 60  # seconds between touches of a lock file by its owner
FRESH = 5 * TOUCHED_EVERY  # seconds without a touch after which a lock counts as abandoned
PARTS, DEPTH = 1_000_000, 20  # limits on plain values, above those of any file of this program
NOT_IN_PATHS = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # other surrogates stand for bytes that are not UTF-8


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


def delete_unfinished(path: Path) -> None:
    """Delete the temporary files of `path` that killed processes left behind."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink()


def _sync_folder(folder: Path) -> None:
    """Write the entries of a folder to the disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Lock:
    """A lock file that names the process and host of the run that uses its folder.

    The process locks the file and touches it each minute and each epoch. The system drops its lock when it ends, so
    that a later run on this host can take over what a killed run left behind. Some file systems have no locks or do not
    pass them on to other hosts. There, the owner counts as alive while the file is fresh, unless it is a dead process
    of this host or belongs to the same SLURM job, which was then requeued.
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
        """Take the lock until `release` or the end of the process; raises a UserError if another process holds it."""
        while True:
            file = open(self.path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115, closing it drops the lock
            self._claim(file, fcntl.LOCK_EX)
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                break  # otherwise, its owner deleted it meanwhile
        self._file = file
        file.truncate(0)
        json.dump(self._me, file)
        file.flush()
        self._released = threading.Event()
        self._toucher = threading.Thread(target=self._keep_fresh, daemon=True)
        self._toucher.start()
        atexit.register(self.release)

    def renew(self) -> None:
        """Touch the lock file; raises a UserError if another run took it over while this process was suspended."""
        owner = _owner(self._file)
        if owner and owner != self._me:
            raise UserError(f"{self.path.parent} was taken over by {_name(owner)}: this run showed no sign of life")
        self._touch()

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
            self._touch()

    def _touch(self) -> None:
        with suppress(OSError):
            os.utime(self._file.fileno())

    def _claim(self, file: IO[str], kind: int) -> None:
        """Lock the file, or raise a UserError."""
        has_locks = True
        try:
            # A record lock: the worker processes that read images would inherit a lock of flock.
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except (PermissionError, BlockingIOError) as error:
            raise UserError(
                f"{self.path.parent} is in use by {_name(_owner(file))}: wait for its end, end it, or choose another "
                "--job_dir"
            ) from error
        except OSError:
            has_locks = False
        owner, age = _owner(file), time.time() - os.fstat(file.fileno()).st_mtime
        if owner and age < FRESH and not self._has_ended(owner, has_locks):
            raise UserError(
                f"{self.path.parent} is in use by {_name(owner)}, which showed a sign of life {max(0, age):.0f} s ago: "
                f"if that process is gone, delete {self.path} or wait {FRESH // 60} minutes"
            )

    def _has_ended(self, owner: dict[str, Any], has_locks: bool) -> bool:
        """Whether an owner that does not lock the file is known to have ended."""
        if owner["host"] != self._me["host"]:
            return "slurm_job_id" in owner and owner["slurm_job_id"] == self._me.get("slurm_job_id")
        if not has_locks:
            try:
                os.kill(owner["pid"], 0)
            except PermissionError:
                return False
            except (ProcessLookupError, OverflowError):
                return True
        return has_locks


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


def to_plain(record: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries, without optional fields that are None."""
    values = {field: getattr(record, field.name) for field in fields(record)}
    return {
        field.name: to_plain(value) if is_dataclass(value) else value
        for field, value in values.items()
        if value is not None or field.default is not None
    }


def from_plain(kind: Any, value: Any, name: str = "") -> Any:
    """The inverse of `to_plain`: check a value from a file against a type hint, and make dataclasses of dictionaries.

    A dataclass ignores unknown keys, a TypedDict keeps them.

    Raises:
        ValueError: the value does not have this type; the message is the name of the first such part, as "meta.mean".
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) or typing.is_typeddict(kind):
        return _record(kind, value, name)
    if origin in (UnionType, typing.Union):
        (kind,) = set(arguments) - {NoneType}
        return None if value is None else from_plain(kind, value, name)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple) or (origin is tuple and len(value) != len(arguments)):
            raise ValueError(name)
        for entry in value:
            from_plain(arguments[0], entry, name)
    elif kind not in _CHECKS or not _CHECKS[kind](value):
        raise ValueError(name)
    return value


def _record(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(name)
    optional = {field.name for field in fields(kind) if field.default is not MISSING} if is_dataclass(kind) else set()
    found = {
        key: from_plain(hint, value.get(key, MISSING), f"{name}.{key}".lstrip("."))
        for key, hint in typing.get_type_hints(kind).items()
        if key in value or key not in optional
    }
    return kind(**found) if is_dataclass(kind) else value | found


def is_plain(value: Any) -> bool:
    """Whether a value can be written as JSON; also ends for cycles and parts that are repeated many times."""
    stack, parts = [(value, 0)], 0
    while stack:
        part, depth = stack.pop()
        parts += 1
        if parts > PARTS or depth > DEPTH:
            return False
        if isinstance(part, dict) and all(isinstance(key, str) for key in part):
            stack.extend((entry, depth + 1) for entry in part.values())
        elif isinstance(part, list | tuple) and len(part) <= PARTS:
            stack.extend((entry, depth + 1) for entry in part)
        elif not (part is None or isinstance(part, bool | str) or _is_number(part)):
            return False
    return True


def is_state_dict(value: Any) -> bool:
    """Whether it is a non-empty dictionary of tensors by name."""
    named = isinstance(value, dict) and all(isinstance(key, str) and len(key) <= 1000 for key in value)
    return named and len(value) > 0 and all(map(is_dense, value.values()))


def is_dense(value: Any) -> bool:
    """Whether it is a strided CPU tensor that is no larger than its memory, as an expanded one would be."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


_CHECKS = {
    str: lambda value: isinstance(value, str) and len(value) <= 4096 and not NOT_IN_PATHS.search(value),
    int: lambda value: type(value) is int and 0 <= value < 2**31,
    float: _is_number,
    bool: lambda value: isinstance(value, bool),
    Tensor: is_dense,
    dict[str, Tensor]: is_state_dict,
    dict[str, Any]: lambda value: isinstance(value, dict),
}
