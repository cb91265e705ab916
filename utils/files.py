"""Writing files so that a reader sees the old one or the new one, never half of either."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from utils.errors import UserError


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write that takes the place of `path` once it is complete and on the disk.

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
    """Delete what killed processes left of writing `path`."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink()


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, too, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
