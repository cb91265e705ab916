"""Output of the scripts: errors in one line, the log, and output streams that never fail."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm


class UserError(ValueError):
    """A mistake that a person can correct; the message says in one line what is wrong and what to do about it."""


def first_line(error: BaseException) -> str:
    """First line of the message of a library's error, or the name of its class if it has no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def announced_rank() -> str:
    """Rank that torchrun announced to this process; "0" without torchrun, which sets WORLD_SIZE as well."""
    return os.environ.get("RANK") or "0" if os.environ.get("WORLD_SIZE") else "0"


def exit_with(error: object) -> NoReturn:
    """Print the error in one line to stderr and end the process with code 2."""
    rank = announced_rank()
    start = "error:" if rank == "0" else f"error (process {rank}):"
    print(start, " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(2)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))  # above a progress bar


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise  # logging would print many lines and go on


log = logging.getLogger("job")
log.setLevel(logging.INFO)
log.propagate = False
log.addHandler(_Lines())


def log_to(path: Path | None) -> None:
    """Also write the log, with times, to `path`, which replaces an earlier one; None stops writing to a file."""
    for handler in [handler for handler in log.handlers if isinstance(handler, _LogFile)]:
        log.removeHandler(handler)
        handler.close()
    if path:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(file)


class _Descriptor(io.FileIO):
    """A file descriptor that drops what cannot be written, because the pipe has no reader or the device is full."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def text_stream(descriptor: int, encoding: str) -> io.TextIOWrapper:
    """A line-buffered stream that escapes characters outside its encoding and never raises."""
    raw = _Descriptor(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


def guard() -> None:
    """Replace sys.stdout and sys.stderr by `text_stream`s, unless a notebook or a test has replaced them already.

    Under torchrun, only the first process writes to standard output.
    """
    for name in ("stdout", "stderr"):
        original = getattr(sys, f"__{name}__")
        if getattr(sys, name) is original:
            silent = original is None or (name == "stdout" and announced_rank() != "0")
            target = (os.open(os.devnull, os.O_WRONLY), "utf-8") if silent else (original.fileno(), original.encoding)
            setattr(sys, name, text_stream(*target))
