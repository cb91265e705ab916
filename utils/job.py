"""The files of a job: its folder, log, metrics and tensorboard events."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from utils.errors import UserError
from utils.files import atomic_write
from utils.options import RESUME_LAST


class Job:
    """A job_dir; nothing is written before `open`.

    Args:
        export_name: file name of the network that the run exports.
    """

    def __init__(self, folder: Path, export_name: str):
        self.folder = folder
        self.config = folder / "config.json"
        self.log_file = folder / "logger.log"
        self.metrics = folder / "metrics.jsonl"
        self.events = folder / "run"
        self.last = folder / "checkpoint" / "last.pt"
        self.best = folder / "checkpoint" / "model_best.pt"
        self.export = folder / export_name
        self.report = folder / "report.md"
        self.report_json = folder / "report.json"
        self.curves = folder / "curves.png"

    def check(self, resumed: Path | None, reset: bool) -> None:
        """Raise a UserError if the folder cannot be written, or holds a run that is neither resumed nor reset."""
        held = [path for path in (self.last, self.best, self.export, self.report_json) if path.exists()]
        own = resumed is not None and resumed.resolve().parent == self.last.resolve().parent
        if held and not (own or reset):
            raise UserError(
                f"{self.folder} already holds a run ({held[0].name}): continue it with --resume, delete it with "
                "--reset, or choose another --job_dir"
            )
        parent = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"--job_dir {self.folder} cannot be written: {parent} is not a writable folder")

    def checkpoint_to_resume(self, flag: str | None) -> Path | None:
        """The file that --resume means; None without it, or if it is bare and there is none yet."""
        if flag == RESUME_LAST:
            return self.last if self.last.exists() else None
        return Path(flag) if flag else None

    def open(self, config: dict[str, Any], epoch: int, reset: bool) -> None:
        """Create the folder, or with reset clear it, and start its logs after `epoch` epochs that a resumed run keeps.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            if reset:
                self._clear()
            with atomic_write(self.config, "w") as file:
                json.dump(config, file, indent=2)
            kept = [line for line in self.read_metrics() if line["epoch"] <= epoch]
            with atomic_write(self.metrics, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
            self.logger = _logger(self.log_file)
            self.writers = {
                phase: SummaryWriter(str(self.events / phase), purge_step=epoch + 1 if epoch else None)
                for phase in ("train", "test")
            }
        except OSError as error:
            raise UserError(f"--job_dir {self.folder} cannot be written: {error}") from error

    def _clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        for path in (self.config, self.log_file, self.metrics, self.last, self.best, self.export):
            path.unlink(missing_ok=True)
        for path in (self.report, self.report_json, self.curves):
            path.unlink(missing_ok=True)
        for phase in ("train", "test"):
            for events in (self.events / phase).glob("events.out.tfevents.*"):
                events.unlink()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one for each epoch; a last line that was cut off is left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def add_metrics(self, epoch: int, lr: float, train: dict[str, Any], val: dict[str, Any]) -> None:
        """Append an epoch to metrics.jsonl and its scalars to tensorboard."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, "lr": lr, "train": train, "val": val}) + "\n")
        self.writers["train"].add_scalar("lr", lr, epoch)
        for phase, values in (("train", train), ("test", val)):
            writer = self.writers[phase]
            for name, value in flatten(values).items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def flatten(values: dict[str, Any]) -> dict[str, float]:
    """{"accuracy": {"students": [a, b]}} -> {"accuracy/student_1": a, "accuracy/student_2": b}."""
    scalars = {}
    for name, value in values.items():
        if isinstance(value, dict):
            scalars |= {f"{name}/{key}": x for key, x in flatten(value).items()}
        elif isinstance(value, list):
            scalars |= {f"{name.removesuffix('s')}_{i}": x for i, x in enumerate(value, start=1)}
        elif value is not None:
            scalars[name] = value
    return scalars


def _logger(path: Path) -> logging.Logger:
    """Plain lines to standard output, the same with the time to `path`."""
    logger = logging.getLogger("job")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(to_file)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    return logger
