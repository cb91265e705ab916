"""The files of a job: its folder, log, metrics and tensorboard events."""

import json
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from utils import distributed
from utils.config import BEST, FORMATS, LAST, RESUME_LAST
from utils.errors import UserError, log_to
from utils.files import Lock, atomic_write, delete_unfinished
from utils.interruption import interruption, resume_command
from utils.metrics import flatten

PHASES = ("train", "test")
MARKS = {"job_dir", "teacher_model", "lambda", "miu", "pretrain"}  # keys that every config.json of this program has


class Job:
    """A job_dir. Nothing is written before `open`, which locks it until `close`.

    Args:
        config: the run's configuration, which determines the name of the exported network.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, self.configuration = folder, config
        self.config = folder / "config.json"
        self.log_file = folder / "logger.log"
        self.metrics = folder / "metrics.jsonl"
        self.events = folder / "run"
        self.last = folder / LAST
        self.best = folder / BEST
        self.export = folder / export_name(config)
        self.export_teacher = folder / export_name(config, "teacher")
        self.report = folder / "report.md"
        self.report_json = folder / "report.json"
        self.curves = folder / "curves.png"
        self.budget = folder / "budget.png"
        self.lock = Lock(folder / "lock")
        self.how_to_go_on = f"continue with: {resume_command()}"
        self.writes = distributed.rank() == 0  # only one process of a run writes
        self.writers: dict[str, EventsWriter] = {}  # of tensorboard, by phase
        self._seen: dict[Path, tuple[int, ...]] | None = None

    def checkpoint_to_resume(self, resume: Path | None, reset: bool, inputs: Sequence[Path | None]) -> Path | None:
        """Check that the run may write here, and find the checkpoint of --resume.

        Args:
            inputs: files and folders that the run reads, which --reset must not delete.

        Returns:
            The checkpoint to resume; None without --resume, or with a bare --resume before anything was trained.

        Raises:
            UserError: the folder cannot be written or is in use; it holds files that are not a run's, or a run that is
                neither resumed nor reset; --reset would delete an input or a file behind a symbolic link.
        """
        if resume == RESUME_LAST:
            resume = self.last if self.last.exists() else None
        is_here = resume is not None and resume.resolve().parent == self.last.resolve().parent
        self.check_writable()
        if self.writes:
            self.lock.check()
        existing = sorted(path for path in self._files() if path.exists())
        if existing and not is_here and not self._earlier_config():
            raise UserError(
                f"{self.folder} holds {existing[0].name}, but no config.json of this program: choose another --job_dir"
            )
        if reset:
            self._check_deletable(existing, inputs)
        elif not is_here:
            self._check_not_trained(existing)
        self._seen = self._stamps(resume)
        return resume

    def _check_deletable(self, existing: Sequence[Path], inputs: Sequence[Path | None]) -> None:
        """Raise a UserError if --reset would delete a file that the run reads, or one outside the folder."""
        deleted = {path.resolve() for path in existing}
        for path in filter(None, inputs):
            if not deleted.isdisjoint({path.resolve(), *path.resolve().glob("*.pt")}):
                raise UserError(f"--reset would delete {path}, which this run needs: choose another --job_dir")
        if linked := [path for path in existing if not self._is_inside(path)]:
            raise UserError(f"--reset does not delete behind a symbolic link: delete {linked[0]} yourself")

    def _check_not_trained(self, existing: Sequence[Path]) -> None:
        """Raise a UserError if there are results of a run."""
        # A run that was killed before its first checkpoint leaves its flags, a log and an empty record.
        results = [path for path in existing if path not in (self.config, self.log_file) and path.stat().st_size]
        if not results:
            return
        state, advice = f"already holds a run ({results[0].name})", "continue it with --resume, "
        if not self.last.exists():
            state = f"holds a run ({results[0].name}) without its {self.last.name}"
            advice = f"continue from its best epoch with --resume {self.best}, " if self.best.exists() else ""
        raise UserError(f"{self.folder} {state}: {advice}delete it with --reset, or choose another --job_dir")

    def check_writable(self) -> None:
        """Raise a UserError if a folder has the name of a file, or a folder cannot be made or written."""
        for path in (*self._files(), self.lock.path):
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a file: delete it, or choose another --job_dir")
        for folder in (self.folder, self.last.parent, *(self.events / phase for phase in PHASES)):
            parent = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                fault = "is not a writable folder" if parent.exists() else "is a symbolic link to nothing"
                raise UserError(f"--job_dir {self.folder} cannot be written: {parent} {fault}")

    def _stamps(self, resumed: Path | None) -> dict[Path, tuple[int, ...]]:
        """Inode, size and time of each file here and of `resumed`, to notice when another run writes them."""
        paths = self._files() | ({resumed} if resumed else set())
        stats = {path: path.stat() for path in paths if path.exists()}
        return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def open(self, resumed: Path | None, epoch: int, reset: bool) -> None:
        """Create the folder, or clear it with `reset`, and start its logs. From then on the run can be resumed.

        Args:
            resumed: the checkpoint to resume. Its job's record and best epoch are copied here if it is elsewhere.
            epoch: epochs done; the record keeps their lines, and tensorboard shows them again.

        Raises:
            UserError: the folder cannot be written, is in use, or another run wrote to it after it was checked.
        """
        if not self.writes:
            return
        kept, times, copies = [], {}, {}
        if resumed:
            source = resumed.parent.parent
            kept = [line for line in read_metrics(source / self.metrics.name) if line["epoch"] <= epoch]
            times = wall_times(source / self.events.name / PHASES[-1])
            copies = {resumed: self.last, resumed.with_name(self.best.name): self.best}
        try:
            with interruption.deferred():
                self.last.parent.mkdir(parents=True, exist_ok=True)
                self.lock.acquire()
                if self._seen is not None and (changed := self._seen.items() ^ self._stamps(resumed).items()):
                    self.lock.release()
                    raise UserError(
                        f"another run has written {min(changed)[0]} meanwhile: look at it, and start this one again"
                    )
                interruption.message = self.how_to_go_on
                self._clear(everything=reset)
                with atomic_write(self.config, "w") as file:
                    json.dump(self.configuration, file, indent=2)
                with atomic_write(self.metrics, "w") as file:
                    file.writelines(json.dumps(line) + "\n" for line in kept)
                for original, copy in copies.items():
                    if original.exists() and original.resolve() != copy.resolve():
                        with atomic_write(copy) as file:
                            file.write(original.read_bytes())
                log_to(self.log_file)
                for phase in PHASES:
                    (self.events / phase).mkdir(parents=True, exist_ok=True)
                    # SummaryWriter has a thread, which would hide a failure or lose events at the end.
                    self.writers[phase] = EventsWriter(str(self.events / phase / "events"))
                for line in kept:
                    self._add_scalars(line, times.get(line["epoch"]))
        except OSError as error:
            raise UserError(f"--job_dir {self.folder} cannot be written: {error}") from error

    def _files(self) -> set[Path]:
        """The files that a run writes, except events, and the networks that the earlier run here exported."""
        files = {self.config, self.log_file, self.metrics, self.last, self.best}
        files |= {self.report, self.report_json, self.curves, self.budget}
        exported = {self.export, self.export_teacher}
        with suppress(KeyError, TypeError):  # there is none, or it is damaged
            earlier = self._earlier_config()
            exported |= {self.folder / Path(export_name(earlier, network)).name for network in ("pruned", "teacher")}
        return files | exported | {deployed(path, form) for path in exported for form in FORMATS}

    def _earlier_config(self) -> dict[str, Any] | None:
        """The configuration of the earlier run here; None without a config.json of this program."""
        with suppress(OSError, ValueError):
            config = json.loads(self.config.read_text(encoding="utf-8"))
            return config if isinstance(config, dict) and config.keys() >= MARKS else None
        return None

    def _is_inside(self, path: Path) -> bool:
        """Whether a path is in the folder, and not behind a symbolic link that leads out of it."""
        return path.parent.resolve().is_relative_to(self.folder.resolve())

    def _clear(self, everything: bool) -> None:
        """Delete unfinished files and events of earlier runs, or all files that a run writes."""
        for path in sorted(self._files(), key=lambda path: path != self.last):  # last.pt first: no half run is resumed
            delete_unfinished(path)
            if everything and path != self.config:  # it marks the folder as this program's until it is replaced
                path.unlink(missing_ok=True)
        for phase in PHASES:
            for events in filter(self._is_inside, (self.events / phase).glob("events.out.tfevents.*")):
                events.unlink()

    def add_metrics(self, epoch: int, lr: float, train: dict[str, Any], val: dict[str, Any]) -> None:
        """Append an epoch to metrics.jsonl and its scalars to tensorboard.

        Raises:
            UserError: another run has taken over the folder.
        """
        if not self.writes:
            return
        self.lock.renew()
        line = {"epoch": epoch, "lr": lr, "train": train, "val": val}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._add_scalars(line)

    def _add_scalars(self, line: dict[str, Any], wall_time: float | None = None) -> None:
        """Write an epoch's scalars to tensorboard: `wall_time` is in seconds since 1970, None for now."""
        wall_time = wall_time or time.time()
        for phase, values in (("train", {"lr": line["lr"], **line["train"]}), ("test", line["val"])):
            for name, value in flatten(values).items():
                event = Event(wall_time=wall_time, step=line["epoch"], summary=scalar(name, value))
                self.writers[phase].write_event(event)
            self.writers[phase].flush()

    def close(self) -> None:
        interruption.message = "the run was complete"
        if not self.writes:
            return
        for writer in self.writers.values():
            writer.close()
        log_to(None)
        self.lock.release()


def export_name(config: dict[str, Any], network: str = "pruned") -> str:
    """File name of the exported student ("pruned") or of the exported online teacher ("teacher")."""
    if config["pretrain"]:
        return f"{config['teacher_model']}.pt"
    return f"{Path(config['arch']).stem}_{network}_{config['pruned_num']}.pt"


def deployed(exported: Path, form: str) -> Path:
    """The file of an exported network in another format, beside it."""
    return exported.with_suffix(f".{form}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, one for each epoch. A last line that was cut off is dropped.

    Raises:
        UserError: another line is damaged.
    """
    if not path.is_file():
        return []
    metrics = []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        epoch = None
        with suppress(ValueError):
            epoch = json.loads(line)
        if not isinstance(epoch, dict) or not epoch.keys() >= {"epoch", "lr", "train", "val"}:
            raise UserError(f"line {number} of {path} is damaged: delete the line, or use --reset")
        metrics.append(epoch)
    return metrics


def wall_times(folder: Path) -> dict[int, float]:
    """When the scalars of each step were written, from the readable part of the events files in a folder."""
    times = {}
    for path in folder.glob("events.out.tfevents.*"):
        content, start = path.read_bytes(), 0
        with suppress(struct.error, DecodeError):  # the file was cut off
            while start < len(content):
                (length,) = struct.unpack_from("<Q", content, start)  # then its checksum, the event, and its checksum
                event = Event.FromString(content[start + 12 : start + 12 + length])
                times[event.step] = event.wall_time
                start += length + 16
    return times
