"""What main.py and finetune.py have in common: a run, from its flags to the trained learner."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
from data.loader import Loaders, make_loaders
from data.sources import DataSet
from utils import checkpoint, distributed, export, report
from utils.config import Config
from utils.cores import cores
from utils.device import describe, pick_device, pick_execution, pick_precision
from utils.engine import Trainer
from utils.job import Job
from utils.teacher import check_accuracy, pretrained_teacher, with_normalization_of


@dataclass(frozen=True)
class Run:
    """What a run computes with.

    Attributes:
        job: its folder; nothing is written there before `train`.
        resumed: the checkpoint to go on from.
        teacher: the pretrained teacher, if there is one, and `remarks` on it for the log.
    """

    config: Config
    device: torch.device
    precision: str
    execution: str
    job: Job
    resumed: Path | None
    dataset: DataSet
    teacher: nn.Module | None
    remarks: list[str]
    loaders: Loaders

    def trainer(self, learner: nn.Module) -> Trainer:
        return Trainer(learner, self.teacher, self.config, self.device, self.precision, self.execution)

    def train(
        self, trainer: Trainer, meta: dict[str, Any], notes: Sequence[str] = (), keep_initial: bool = False
    ) -> None:
        """Train to the last epoch, and put the best one's weights back into the learner.

        Args:
            meta: of the checkpoints.
            notes: for the log, on what is trained.
            keep_initial: the students as they are before training may turn out the best.

        Raises:
            UserError: the checkpoint to resume does not fit, the pretrained teacher cannot teach, the job's folder
                cannot be written, a loss is not finite.
        """
        config, job, teacher = self.config, self.job, self.teacher
        if self.resumed:
            trainer.resume(self.resumed, meta, config.force)
        val = self.loaders.val
        found = check_accuracy(teacher, val, self.dataset.val.targets, config.force) if teacher else None
        job.open(self.resumed, trainer.epoch, config.reset)
        machine = f"{describe(self.device)}, {self.precision}, {self.execution}"
        lines = [f"{report.headline(self.dataset)}; {machine}", *report.repeated(self.dataset)]
        if config.resume:
            lines.append(f"resuming after {trainer.reached}" if self.resumed else "no checkpoint yet: starting anew")
        if teacher:
            role = "" if config.miu else ", only to compare with"
            lines += [f"pretrained teacher: {found} on the validation set{role}", *self.remarks]
        for line in (*lines, *notes):
            job.logger.info(line)
        trainer.fit(self.loaders.train, val, job, meta, keep_initial)
        trainer.load_best(job)

    def end(self) -> None:
        self.job.close()
        distributed.stop()


def prepare(config: Config, inputs: Sequence[Path | None], trained: tuple[Path, dict[str, Any]] | None = None) -> Run:
    """Everything that can be wrong comes first: nothing is written.

    Args:
        inputs: files and folders that the run reads.
        trained: a file with a trained network, and its metadata, whose normalization the data gets.

    Raises:
        UserError: a package, the device, the data or the teacher is not as the flags say; the job's folder is not free.
    """
    export.check_packages(config.export)
    device = distributed.start(pick_device(config.device))
    precision, execution = pick_precision(config.precision, device), pick_execution(config.compile, device)
    job = Job(config.job_dir, config.recorded())
    resumed = None if config.test_only else job.checkpoint_to_resume(config.resume, config.reset, inputs)
    workers = config.workers or min(8, cores())
    with distributed.first_on_each_machine():
        dataset = data.load(
            config.dataset, config.data_dir, config.val_size, workers, config.image_size, config.train_size
        )
    if trained:
        path, meta = trained
        dataset = checkpoint.as_trained(dataset, meta, path)
    teacher, remarks = pretrained_teacher(config, dataset, device)
    if config.init == "teacher":
        dataset, teacher = with_normalization_of(teacher, dataset)
    loaders = make_loaders(dataset, config.train_batch_size, config.eval_batch_size, config.seed, device, workers)
    return Run(config, device, precision, execution, job, resumed, dataset, teacher, remarks, loaders)
