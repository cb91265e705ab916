"""Signals end a process in order: one line that says what is saved, and exit code 128 + the signal's number."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import FrameType
from typing import NoReturn, TypeVar

from utils.errors import announced_rank

REQUESTS = (signal.SIGINT, signal.SIGTERM)  # from people: Ctrl-C, kill
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # from terminals, schedulers and limits
SIGNALS = REQUESTS + WARNINGS
ECHO = 0.2  # seconds within which a repeated signal is the same request: `timeout` sends every signal twice

T = TypeVar("T")


class Interruption:
    """Ends the process after a signal, at once or, within `deferred`, when it is ready.

    Attributes:
        pending: number of the signal received, 0 if none.
        message: what is saved if the process ends now, and how to go on.
    """

    def __init__(self):
        self.pending = 0
        self.message = "nothing was changed"
        self._deferred, self._received_at = False, 0.0

    def catch(self) -> None:
        """Handle the signals from now on, except those that are ignored already, as with nohup."""
        for number in SIGNALS:
            if number in REQUESTS or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self.pending
        if first or (self.pending in WARNINGS and number in REQUESTS):  # after a warning, a request is the first one
            self.pending, self._received_at = number, time.monotonic()
            if first and not self._deferred:
                self.end()
            return
        # A limit of CPU time is signaled every second. torchrun forwards its signals to its processes, which may have
        # received them already, and kills those that do not end in time.
        echo = number == self.pending and time.monotonic() - self._received_at < ECHO
        if number in REQUESTS and not echo and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(128 + number)

    def end(self) -> NoReturn:
        """Print the line and raise SystemExit."""
        start = "\n" if sys.stderr.isatty() else ""  # below the progress bar, or the ^C that the terminal shows
        line = f"{start}interrupted by {signal.Signals(self.pending).name}: {self.message}\n"
        if announced_rank() == "0":  # only one process of many prints
            with suppress(OSError):  # the terminal may be closed
                # A signal may come while Python's own buffers are in use.
                os.write(2, line.encode(errors="surrogateescape"))
        sys.exit(128 + self.pending)

    def until_pending(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to and including the first one during which a signal arrived."""
        for item in items:
            yield item
            if self.pending:
                return

    def ignore_first(self) -> None:
        """The process is ending: ignore one more signal; a second one ends it at once."""
        self._deferred = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context, a signal only sets `pending`; leaving the context then ends the process."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.pending:
            self.end()


interruption = Interruption()


def resume_command() -> str:
    """The command that continues this run: its own, with a bare --resume and without --reset."""
    words, machines = sys.orig_argv[1:], os.environ.get("GROUP_WORLD_SIZE")
    if machines:  # torchrun started it
        processes = os.environ["LOCAL_WORLD_SIZE"]
        words = ["-m", "torch.distributed.run", f"--nnodes={machines}", f"--nproc_per_node={processes}", *sys.argv]
    kept = []
    for before, word in pairwise(["", *words]):
        value = before == "--resume" and not word.startswith("-")
        if not value and word not in ("--resume", "--reset") and not word.startswith("--resume="):
            kept.append(word)
    return shlex.join([sys.executable, *kept, "--resume"])
