"""The training loop, shared by main.py and finetune.py: the step, the epoch, the fit, and the schedule of its rates."""

import math
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.loader import AugmentedBatches, Batches, Waiting, epoch_seed
from model.online import Students
from model.weights import load_momentum, load_weights, place
from utils import checkpoint, distributed
from utils.checkpoint import Meta, Progress, TrainingCheckpoint
from utils.config import Config
from utils.device import COMPILED, GRAPH, Execution, GraphedStep, changes, environment, random_state, set_random_state
from utils.errors import UserError, log
from utils.files import to_plain
from utils.interruption import interruption
from utils.job import Job
from utils.methods import METHODS
from utils.metrics import Best, EpochMeans, Scores, StepResult, TrainingScores, all_logits, evaluate, flatten

DIVERGED = "the loss is not finite"  # starts the error of a run that diverged; experiment/study.py looks for it


class Trainer:
    """Trains a learner (Students or OnlineTeacher) with the objective of the method.

    Args:
        teacher: the pretrained teacher, frozen and in eval mode, or None.

    Attributes:
        epoch: epochs done; during training, the one in progress.
        best: the best student on the validation set so far.
        waiting: the batches of the last epoch, with the share of its time that it waited for them.
        seconds: of training and validation up to the last save, including those before the run was resumed.
        reached: for a log line, the point that a resumed run goes on from.
    """

    def __init__(
        self, learner: Students, teacher: nn.Module | None, config: Config, device: torch.device, execution: Execution
    ):
        self.config, self.device, self.execution = config, device, execution
        self.learner = place(learner, device)
        self.teacher = teacher if config.miu else None
        self.environment = environment(device, execution)

        self.objective = METHODS[config.method].objective(config)
        self.optimizer = torch.optim.SGD(
            learner.parameters(),
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
        self.forward = torch.compile(self.learner) if execution.code == COMPILED else self.learner
        if distributed.world_size() > 1:
            if config.sync_bn:
                distributed.synchronize_batch_norm(self.learner)
            self.forward = DistributedDataParallel(self.learner, [device] if device.type == "cuda" else None)
        graphed = execution.code in (GRAPH, COMPILED)
        self.step = GraphedStep(self.train_step) if graphed else self.train_step
        self.rampup = 1.0
        # A CUDA graph reads the learning rate and the factor of the online term from memory.
        self.on_device = torch.ones(2, device=device).unbind() if graphed else None

        self.epoch = 0
        self.means = EpochMeans()  # of the epoch in progress
        self.scores: Scores | None = None  # on the validation set, of the last epoch done
        self.best: Best | None = None
        self._begun: Progress | None = None  # the epoch that a resumed run had begun, from its checkpoint
        self.seconds, self._since = 0.0, time.perf_counter()  # the time of the last save

    def train_step(self, images: Tensor, targets: Tensor) -> StepResult:
        """One step of SGD on this process's share of a batch, (B, 3, H, W) and (B,), in --accumulate parts."""
        shares = distributed.counts(len(targets))
        processes, size = len(shares), sum(shares)
        parts = max(1, min(self.config.accumulate, min(shares) // 2))  # BatchNorm needs two images
        self.optimizer.zero_grad()
        outcome = 0
        for part, batch in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True), 1):
            weight = len(batch[1]) / size
            with nullcontext() if part == parts or processes == 1 else self.forward.no_sync():
                losses, correct = self.losses(*batch)
                (processes * weight * losses["loss"]).backward()  # the gradients are averaged over the processes
            outcome = outcome + torch.cat([weight * torch.stack(list(losses.values())).detach(), correct])
        self.optimizer.step()
        outcome = distributed.total(outcome)
        return StepResult(dict(zip(losses, outcome, strict=False)), outcome[len(losses) :], size)

    def losses(self, images: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The loss and its terms, and (networks,) counts of correct predictions."""
        with self.execution.autocast(self.device):
            student_logits, teacher_logits, *others = self.forward(images)
            with torch.no_grad():
                pretrained_logits = None if self.teacher is None else self.teacher(images)
        outputs = (student_logits, teacher_logits, targets, *others)
        losses = self.objective(*outputs, pretrained_logits=pretrained_logits, rampup=self.rampup)
        with torch.no_grad():
            correct = (all_logits(student_logits, teacher_logits).argmax(-1) == targets).sum(1)
        return losses, correct

    def train_one_epoch(self, batches: AugmentedBatches, job: Job, meta: Meta) -> TrainingScores:
        """One pass over `batches`, or the rest of one, and a checkpoint after its last step.

        Waits for the device only every print_freq steps, before a checkpoint, and at the end.

        Raises:
            UserError: a loss is not finite.
            SystemExit: after a signal; the steps so far are saved.
        """
        self.learner.train()
        means, steps = self.means, len(batches)
        with tqdm(
            desc=self._title, total=batches.num_images, initial=means.images, unit=" images", leave=False, disable=None
        ) as bar:
            self.waiting = Waiting(batches)
            for images, targets in self.waiting:
                moment = self.epoch, (means.steps + 1) / steps
                self.set_rates(learning_rate(self.config, *moment), online_rampup(self.config, *moment))
                result = self.step(images, targets)
                means.add(result)
                bar.update(result.size)
                if means.steps % self.config.print_freq == 0:
                    self._settle(steps, job)
                    loss, waited = f"{means.losses[-1][0]:.4f}", self.waiting.share
                    bar.set_postfix(loss=loss, data=waited)
                    if bar.disable and means.steps < steps:  # without a terminal
                        log.info(f"{self._title}, step {means.steps}/{steps}: loss {loss}, data {waited}")
                self._save_if_due(batches, job, meta)
        self._settle(steps, job)
        distributed.copy_buffers_of_first(self.learner)
        # Evaluation may take longer than a scheduler waits after its signal. If the weights are not finite, it fails.
        if all(value.isfinite().all() for value in self.learner.state_dict().values()):
            self._save(job.last, job, meta, batches)
        self.means = EpochMeans()
        return means.scores(self.learner)

    def set_rates(self, rate: float, rampup: float) -> None:
        """Set the learning rate and the factor of the online term."""
        if self.on_device:
            rate, rampup = (memory.fill_(value) for memory, value in zip(self.on_device, (rate, rampup), strict=True))
        self.rampup = rampup
        self.optimizer.param_groups[0]["lr"] = rate

    def _save_if_due(self, batches: AugmentedBatches, job: Job, meta: Meta) -> None:
        """Save the epoch in progress every --save_every_minutes, and before a signal ends the process."""
        interrupted, minutes = _interrupted(), self.config.save_every_minutes
        if interrupted or (minutes and time.perf_counter() - self._since >= 60 * minutes):
            self._settle(len(batches), job)
            self._save(job.last, job, meta, batches)
            if interrupted:
                step = f"step {self.means.steps}/{len(batches)}"
                interruption.message = f"{self._title}, {step} is saved; {job.how_to_go_on}"
                interruption.end()

    def _settle(self, steps: int, job: Job) -> None:
        """Wait for the device, and check the losses since the last time."""
        for step, terms in self.means.settle().items():
            self._check_finite(terms, f"step {step}", learning_rate(self.config, self.epoch, step / steps), job.last)

    def fit(self, train: AugmentedBatches, val: Batches, job: Job, meta: Meta, keep_initial: bool = False) -> None:
        """Train to the last epoch, and save before and after each evaluation.

        Args:
            keep_initial: the students as they are before training may turn out the best.

        Raises:
            UserError: a loss is not finite; model_best.pt is as it was, last.pt only if it was a loss in training.
            SystemExit: after a signal.
        """
        self._since = time.perf_counter()
        with interruption.deferred():
            if keep_initial and self.best is None:
                self.scores = self._evaluate(val)
                if not all(map(math.isfinite, flatten(to_plain(self.scores)).values())):
                    raise UserError("the logits of the student to refine are not finite on the validation set")
                self._save(job.last, job, meta)  # model_best.pt alone would not be a run to resume
                self._keep_best(job, meta)
            started, first = time.perf_counter(), self.epoch
            while self.epoch < self.config.num_epochs and not _interrupted():
                epoch_started, images = time.perf_counter(), train.num_images - self.means.images
                self._begin_epoch(train)
                train_scores = self.train_one_epoch(train, job, meta)
                seconds = time.perf_counter() - epoch_started
                speed = f"{images / seconds:,.0f} images/s, data {self.waiting.share}, "
                interruption.message = f"{self._title} is saved, not evaluated; {job.how_to_go_on}"
                self.scores = self._evaluate(val)
                interruption.message = job.how_to_go_on
                rate, val_scores = learning_rate(self.config, self.epoch), to_plain(self.scores)
                self._check_finite(flatten(val_scores), "on the validation set", rate, job.best)
                self._keep_best(job, meta)
                job.add_metrics(self.epoch, rate, to_plain(train_scores), val_scores)
                self._save(job.last, job, meta)
                left = (time.perf_counter() - started) / (self.epoch - first) * (self.config.num_epochs - self.epoch)
                log.info(
                    f"{self._title}: loss {train_scores.loss['total']:.4f}, "
                    f"validation {self.scores}, best {self.best.accuracy:.2f}; "
                    + (speed if images else "")  # a resumed run may have had its last step
                    + f"{timedelta(seconds=round(left))} left"
                )
            if self.epoch == self.config.num_epochs:
                interruption.message = f"training is complete, its report is not; {job.how_to_go_on}"

    def _begin_epoch(self, train: AugmentedBatches) -> None:
        """Go to the next epoch, or back into the one that a resumed run had begun."""
        begun, self._begun = self._begun, None
        self.epoch += 1
        train.set_epoch(self.epoch, begun.position if begun else 0)
        if begun:
            set_random_state(begun.random)
        else:  # dropout draws the same numbers in a resumed run, and other ones in each process
            torch.manual_seed(epoch_seed(self.config.seed, self.epoch) + distributed.rank() * 2**40)

    def _evaluate(self, val: Batches) -> Scores:
        scores = evaluate(self.learner, interruption.until_pending(val))
        if _interrupted():
            interruption.end()
        return scores

    def resume(self, path: Path, meta: Meta, force: bool = False) -> None:
        """Go on from a training checkpoint; arguments and errors are those of `checkpoint.load_to_resume`."""
        content = checkpoint.load_to_resume(path, meta, force)
        load_weights(self.learner, content.model, str(path))
        load_momentum(self.optimizer, content.optimizer, str(path))
        self.epoch, self.scores, self.best = content.epoch, content.scores, content.best
        self.seconds, self._begun = content.seconds or 0.0, content.progress
        if done := self._begun:
            correct = done.correct.to(self.device)
            self.means = EpochMeans(done.names, done.losses.tolist(), done.sizes.tolist(), correct)
        steps = f" and {self.means.steps} steps of the next" if self.means.steps else ""
        self.reached = f"epoch {self.epoch}{steps}{changes(content.environment or {}, self.environment)}"

    @property
    def best_student(self) -> nn.Module:
        return self.learner.students[self.best.student]

    def load_best(self, job: Job) -> None:
        """Load the weights of the best epoch into the learner."""
        distributed.wait_for_all()  # the first process writes the file
        content = checkpoint.load(job.best, TrainingCheckpoint)
        load_weights(self.learner, content.model, str(job.best))
        self.best = content.best

    @property
    def _title(self) -> str:
        return f"epoch {self.epoch}/{self.config.num_epochs}"

    def _keep_best(self, job: Job, meta: Meta) -> None:
        candidates = METHODS[self.config.method].candidates(len(self.learner.students))
        best = Best.of(self.epoch, self.scores, candidates)
        if self.best is None or best.rank > self.best.rank:
            self.best = best
            self._save(job.best, job, meta)

    def _save(self, path: Path, job: Job, meta: Meta, batches: AugmentedBatches | None = None) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        if job.writes:
            checkpoint.save(path, self._state(meta, batches))

    def _state(self, meta: Meta, batches: AugmentedBatches | None = None) -> TrainingCheckpoint:
        """A training checkpoint; `batches` are those of the epoch in progress, if there is one."""
        progress = None
        if batches is not None:  # their position is larger than the number of steps if some had no readable image
            progress = Progress(batches.position, random_state(self.device), **self.means.state_dict())
        optimizer = self.optimizer.state_dict()
        (group,) = optimizer["param_groups"]
        group["lr"] = float(group["lr"])
        return TrainingCheckpoint(
            epoch=self.epoch - 1 if progress else self.epoch,
            model=self.learner.state_dict(),
            optimizer=optimizer,
            scores=self.scores,
            best=self.best,
            meta=meta,
            progress=progress,
            seconds=self.seconds,
            environment=self.environment,
        )

    def _check_finite(self, losses: dict[str, float], where: str, rate: float, good: Path) -> None:
        if not all(map(math.isfinite, losses.values())):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            kept = f"{good} is the last good checkpoint" if good.exists() else "no epoch was finished"
            raise UserError(
                f"{DIVERGED} in epoch {self.epoch}, {where}: {terms}, learning rate {rate:g}; {kept}: "
                "lower --lr, --lambda or --miu, raise --warmup_epochs, or try --precision fp32"
            )


def learning_rate(config: Config, epoch: int, share: float = 1.0) -> float:
    """Learning rate of an epoch (from 1), of whose steps a share is done, including the current one.

    "step" divides it by 10 after each of lr_decay_step; "cosine" is half a cosine down to 0 (arXiv 1608.03983, without
    restarts). Both rise linearly at first: ResNets this deep do not start to learn at the full rate (arXiv 1512.03385,
    section 4.2), and with the distillation terms ResNet-56 students diverge without a warm-up.
    """
    if config.scheduler == "cosine":
        rate = config.lr / 2 * (1 + math.cos(math.pi * (epoch - 1) / config.num_epochs))
    else:
        rate = config.lr * 0.1 ** sum(epoch > decay for decay in config.lr_decay_step)
    return rate * _share_of(config.warmup_epochs, epoch, share)


def online_rampup(config: Config, epoch: int, share: float = 1.0) -> float:
    """Factor of the online term: exp(-5 (1 - t)^2), t from 0 to 1 over rampup_epochs (arXiv 1610.02242, section 2)."""
    return math.exp(-5 * (1 - _share_of(config.rampup_epochs, epoch, share)) ** 2)


def _share_of(epochs: float, epoch: int, share: float) -> float:
    """How much of the first `epochs` is done, from 0 to 1."""
    return min(1.0, (epoch - 1 + share) / epochs) if epochs else 1.0


def _interrupted() -> bool:
    """Whether a signal has reached any process; all processes learn of it at the same step."""
    if signal := max(distributed.counts(interruption.pending)):
        interruption.pending = signal
    return bool(signal)
