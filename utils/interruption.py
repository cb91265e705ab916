"""SIGINT (Ctrl-C) and SIGTERM end a process in order: one line that says what holds, and exit code 130 or 143."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.2  # seconds in which the same signal once more is the same request: `timeout` sends every signal twice


class Interruption:
    """What the signals mean to this process once they are caught: its end, at once or when it is ready for it.

    Attributes:
        pending: the signal that was received; 0 if none was.
        message: what holds if the process ends now, and how to go on.
    """

    def __init__(self):
        self.pending = 0
        self.message = "nothing was changed"
        self._deferred = False
        self._received_at = 0.0

    def catch(self) -> None:
        """Handle the signals from here on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == self.pending and time.monotonic() - self._received_at < ECHO:
            return
        if self.pending:  # the second signal: no more patience
            os._exit(128 + number)
        self.pending, self._received_at = number, time.monotonic()
        if not self._deferred:
            self.end()

    def end(self) -> NoReturn:
        """Print the line and raise SystemExit."""
        start = "\n" if sys.stderr.isatty() else ""  # below the progress bar, or the ^C that the terminal shows
        line = f"{start}interrupted by {signal.Signals(self.pending).name}: {self.message}\n"
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one speaks
            os.write(
                2, line.encode(errors="surrogateescape")
            )  # a signal may come while Python's own buffers are in use
        sys.exit(128 + self.pending)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal only becomes `pending`: whoever sees that may `end`; leaving does so otherwise."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.pending:
            self.end()


@contextmanager
def out_of_reach() -> Iterator[None]:
    """No signal of a terminal or a job scheduler reaches the processes that are started within.

    They get what the whole process group gets, and would die with a traceback before this process is done with them.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it, and thereby unblock the signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


interruption = Interruption()
