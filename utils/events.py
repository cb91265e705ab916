"""Scalars for tensorboard."""

import struct
import time
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar


class Events:
    """An events file in a folder, written when it is told to be: no thread that would lose or hide a failure."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))

    def add(self, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Raises OSError if they cannot be written.

        Args:
            wall_time: seconds since the epoch; None: now.
        """
        for name, value in scalars.items():
            self._writer.write_event(Event(wall_time=wall_time or time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def wall_times(folder: Path) -> dict[int, float]:
    """When the scalars of each step were written, as far as the events files in a folder can be read."""
    times = {}
    for path in folder.glob("events.out.tfevents.*"):
        content, start = path.read_bytes(), 0
        with suppress(struct.error, DecodeError):  # it was cut off
            while start < len(content):
                (length,) = struct.unpack_from("<Q", content, start)  # then its checksum, the event, and its checksum
                event = Event.FromString(content[start + 12 : start + 12 + length])
                times[event.step] = event.wall_time
                start += length + 16
    return times
