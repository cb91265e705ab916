"""What the program says to a person: the log, whose lines go to standard output, and streams that take every line."""

import io
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))  # above a progress bar


log = logging.getLogger("job")
log.setLevel(logging.INFO)
log.propagate = False
log.addHandler(_Lines())


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise  # logging would print many lines and go on


def log_to(path: Path | None) -> None:
    """Write the lines of the log, with the time, to this file as well, and no longer to the one before."""
    for handler in [handler for handler in log.handlers if isinstance(handler, _LogFile)]:
        log.removeHandler(handler)
        handler.close()
    if path:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(file)


class _Descriptor(io.FileIO):
    """A file descriptor that drops what it cannot write: nobody reads the pipe any more, or the device is full."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def text_stream(descriptor: int, encoding: str) -> io.TextIOWrapper:
    """A stream that writes line by line, escapes what the encoding lacks, and never fails."""
    raw = _Descriptor(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


def guard() -> None:
    """Make sys.stdout and sys.stderr `text_stream`s, unless a notebook or a test has replaced them.

    Of the processes that torchrun started, the first one alone has a standard output.
    """
    first = (os.environ.get("RANK") or "0") == "0"
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        if getattr(sys, name) is not original:
            continue
        if original is None or (name == "stdout" and not first):
            setattr(sys, name, text_stream(os.open(os.devnull, os.O_WRONLY), "utf-8"))
        else:
            setattr(sys, name, text_stream(original.fileno(), original.encoding))
