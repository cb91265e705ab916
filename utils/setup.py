"""The parts that main.py and finetune.py share: a run, from its flags to the trained learner."""

import errno
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from data import Loaders, make_loaders, sample
from data.sources import DataSet
from model import build, variant_for
from model.online import Students
from model.split import check_features
from utils import distributed
from utils.checkpoint import Meta, TrainingCheckpoint, load
from utils.config import AUTO, Config
from utils.cost import Candidates, check_fits
from utils.device import Execution, apply_execution, contention, cores, describe, pick_device, pick_execution
from utils.engine import Trainer
from utils.errors import UserError, exit_with, guard, log
from utils.interruption import interruption
from utils.job import Job
from utils.methods import METHODS
from utils.teacher import check_accuracy, pretrained_teacher, start_from, with_normalization_of

# Refusals of the operating system: missing permission, no space left, an impossible name, too many open files.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
}
OUT_OF_MEMORY = (
    "out of memory: lower --train_batch_size, --eval_batch_size, --num_students, --image_size or --workers, or take a "
    "smaller network"
)
# PyTorch reports failures of the machine as RuntimeErrors: parts of its messages, and the advice on them.
FAILURES = {
    ("Too many open files",): "too many open files: raise the limit (ulimit -n), or try fewer --workers",
    ("shared memory",): (  # the worker processes of a DataLoader put images there
        "shared memory (/dev/shm) is full: try fewer --workers or smaller batches, or start the container with more, "
        "by --shm-size or --ipc=host"
    ),
    ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc"): OUT_OF_MEMORY,
    ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted"): (
        "another process of this run has died: its own message says why; continue with --resume"
    ),
    ("DataLoader worker (pid",): (
        "a process that reads images died, perhaps because memory ran out: try fewer --workers ({error})"
    ),
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Run:
    """Everything that a run computes with.

    Attributes:
        job: its folder; nothing is written there before `train`.
        resumed: the checkpoint to go on from.
        remarks: on the pretrained teacher, for the log.
    """

    config: Config
    device: torch.device
    execution: Execution
    job: Job
    resumed: Path | None
    dataset: DataSet
    teacher: nn.Module | None
    remarks: list[str]
    loaders: Loaders
    workers: int

    def students(self, build: Callable[..., nn.Module]) -> tuple[list[nn.Module], list[list[float]] | None]:
        """The students and, with --pruned_num auto, those that were compared, as in `Meta.budget`.

        Args:
            build: as for `Candidates`, which raise a UserError if no student keeps within the budget.
        """
        config, names, points = self.config, None, None
        if config.pruned_num == AUTO and self.resumed:
            meta = load(self.resumed, TrainingCheckpoint).meta
            names, points = meta.build["replaced"], meta.budget
        elif config.pruned_num == AUTO:
            found = Candidates(build, self.teacher, self.dataset.input_size, self.sample(), self.loaders.val)
            number = found.within_macs(config.macs) if config.macs else found.within_drop(config.max_drop)
            names, points = found.names[:number], found.curve(number)
        return [build(replaced=names) for _ in range(config.num_students)], points

    def learner(self, networks: Sequence[nn.Module]) -> Students:
        """The learner of these networks; raises a UserError if they do not fit the images or the classes."""
        num_classes = len(self.dataset.classes)
        method, name, size = METHODS[self.config.method], self.config.trained_model, self.dataset.input_size
        check_fits(networks[0], name, size, num_classes)
        if method.needs_features(self.config):
            check_features(networks[0], name, size)
        return method.learner(self.config, networks, num_classes)

    def start(self, students: Sequence[nn.Module]) -> str:
        """Start the students from random weights or, with --init teacher, from the teacher's; for log and report."""
        if self.config.init != "teacher":
            return "from random weights"
        return start_from(self.teacher, students, self.sample(), self.loaders.val)

    def sample(self) -> list[Tensor]:
        """Batches of training images, to fit cheap convolutions on."""
        return sample(self.dataset, self.device, self.workers)

    def trainer(self, learner: Students) -> Trainer:
        return Trainer(learner, self.teacher, self.config, self.device, self.execution)

    def train(self, trainer: Trainer, meta: Meta, notes: Sequence[str] = (), keep_initial: bool = False) -> None:
        """Train to the last epoch, and put the best one's weights back into the learner.

        Args:
            meta, keep_initial: as in `Trainer.fit`.
            notes: for the log, on what is trained.

        Raises:
            UserError: the checkpoint to resume does not fit, the pretrained teacher cannot teach, the job's folder
                cannot be written, a loss is not finite.
        """
        config, job, dataset, val = self.config, self.job, self.dataset, self.loaders.val
        if self.resumed:
            trainer.resume(self.resumed, meta, config.force)
        lines = [f"{dataset}; {describe(self.device)}, {self.execution.precision}, {self.execution}", *dataset.notes()]
        lines += contention(self.device)
        if config.resume:
            lines.append(f"resuming after {trainer.reached}" if self.resumed else "no checkpoint to resume yet")
        if self.teacher:
            found = check_accuracy(self.teacher, val, dataset.val.targets, config.force)
            role = "" if config.miu else ", only to compare with"
            lines += [f"pretrained teacher: {found} on the validation set{role}", *self.remarks]
        job.open(self.resumed, trainer.epoch, config.reset)
        for line in (*lines, *notes):
            log.info(line)
        trainer.fit(self.loaders.train, val, job, meta, keep_initial)
        trainer.load_best(job)

    def end(self) -> None:
        self.job.close()
        distributed.stop()


def standard_network(config: Config, dataset: DataSet) -> nn.Module:
    """The untrained standard network for the images and classes of `dataset`."""
    variant = variant_for(config.arch, config.teacher_model, dataset.input_size)
    return build(config.teacher_model, len(dataset.classes), arch=config.arch, **variant)


def prepare(config: Config, trained: tuple[Path, Meta] | None = None) -> Run:
    """Check and load everything that a run needs, without writing anything.

    Args:
        trained: a file with a trained network, and its metadata, whose normalization the data gets.

    Raises:
        UserError: a package, the device, the data or the teacher is not as the flags say; the job's folder is not free.
    """
    check_packages(config.export)
    device = distributed.start(pick_device(config.device))
    execution = pick_execution(config.compile, config.precision, device)
    apply_execution(execution)
    job = Job(config.job_dir, config.recorded())
    inputs = [config.refine, config.teacher_dir]
    resumed = None if config.test_only else job.checkpoint_to_resume(config.resume, config.reset, inputs)
    workers = min(config.workers or 8, cores())
    sizes = (config.val_size, workers, config.image_size, config.train_size)
    dataset = data.load(config.dataset, config.data_dir, *sizes, labels=config.labels)
    for remark in dataset.remarks if config.test_only else ():  # otherwise they go to the log of the job
        log.info(remark)
    if trained:
        path, meta = trained
        dataset = dataset.normalized_as(meta.mean, meta.std, meta.classes, path)
    teacher, remarks = pretrained_teacher(config, dataset, device)
    if config.init == "teacher" and not trained:
        dataset, teacher = with_normalization_of(teacher, dataset)
    loaders = make_loaders(dataset, config.train_batch_size, config.eval_batch_size, config.seed, device, workers)
    return Run(config, device, execution, job, resumed, dataset, teacher, remarks, loaders, workers)


def check_packages(formats: Sequence[str]) -> None:
    """Raise a UserError unless the packages that these formats need are installed."""
    try:
        for package in ONNX_PACKAGES if "onnx" in formats else ():
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"--export onnx needs packages: pip install {' '.join(ONNX_PACKAGES)} ({error})") from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a person's mistake or a failure of the machine ends it with one line and code 2.

    Bugs keep their traceback.
    """
    guard()
    try:
        main()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if explanation := _explain(error):
            exit_with(explanation)
        raise
    finally:
        interruption.ignore_first()


def _explain(error: Exception) -> str | None:
    """The message of a mistake or failure; None for a bug."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError):
        if "temporary directory" in text:  # raised by tempfile
            return "no folder for temporary files can be written: set TMPDIR to one that can"
        return f"{error.filename or 'writing'}: {error.strerror}" if error.errno in REFUSALS else None
    for fragments, explanation in FAILURES.items():
        if any(fragment in text for fragment in fragments):
            return explanation.format(error=error)
    return OUT_OF_MEMORY if isinstance(error, MemoryError) else None
