"""The training loop, shared by main.py and finetune.py."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.loader import AugmentedBatches, Batches, epoch_seed
from model.online import Students
from model.weights import load_weights
from utils import checkpoint, distributed, inputs
from utils.config import Config, as_typed, changed_flag
from utils.device import COMPILED, GRAPH, PLAIN, autocast, environment, random_state, set_random_state
from utils.errors import UserError
from utils.graphs import GraphedStep
from utils.interruption import interruption
from utils.job import Job
from utils.methods import METHODS
from utils.metrics import Best, EpochMeans, Scores, StepResult, TrainingScores, all_logits, evaluate, flatten, plain
from utils.schedule import Schedule


class Trainer:
    """Trains a learner (Students or OnlineTeacher) with the objective that the flags describe.

    Args:
        teacher: the pretrained teacher, frozen and in eval mode, or None.
        execution: how to run a step, as `utils.device.pick_execution` chose.

    Attributes:
        epoch: epochs done; in training, the one in progress.
        means: of the steps of the epoch in progress.
        scores: of the last epoch done, on the validation set.
        seconds: of training and validation so far, with those before the run was resumed.
        best: the best student on the validation set so far.
    """

    def __init__(
        self,
        learner: Students,
        teacher: nn.Module | None,
        args: Config,
        device: torch.device,
        precision: str,
        execution: str = PLAIN,
    ):
        self.learner = learner.to(device, memory_format=torch.channels_last)
        self.teacher = teacher if args.miu else None
        self.device, self.precision, self.execution = device, precision, execution
        self.environment, self.differences = environment(device, precision, execution), ""
        self.num_epochs, self.print_freq, self.seed = args.num_epochs, args.print_freq, args.seed
        self.save_every = 60 * args.save_every_minutes if args.save_every_minutes else math.inf  # seconds
        self.objective = METHODS[args.method].objective(args)
        self.optimizer = torch.optim.SGD(
            learner.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
        )
        self.schedule, self.accumulate = Schedule(args), args.accumulate
        graphed = execution in (GRAPH, COMPILED)
        if graphed:
            self.train_step = GraphedStep(self.train_step)
        if args.sync_bn and distributed.world_size() > 1:
            distributed.synchronize_batch_norm(self.learner)
        self.forward = torch.compile(self.learner) if execution == COMPILED else self.learner
        if distributed.world_size() > 1:
            devices = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.learner, devices)
        self.rampup = 1.0
        # A recorded step reads the learning rate, and the factor of the online term, from memory.
        self.on_device = torch.ones(2, device=device).unbind() if graphed else None
        self.epoch = 0
        self.scores: Scores | None = None
        self.best: Best | None = None
        self.means, self._begun = EpochMeans(), None
        self.saved_at = time.monotonic()
        self.seconds, self._counted_at = 0.0, time.perf_counter()

    def train_step(self, images: Tensor, targets: Tensor) -> StepResult:
        """One step of SGD on a batch, of which each process has its share, in --accumulate parts."""
        shares = distributed.counts(len(targets))
        processes, size = len(shares), sum(shares)
        parts = max(1, min(self.accumulate, min(shares) // 2))  # BatchNorm needs two images
        self.optimizer.zero_grad()
        outcome = 0
        for part, of_part in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True), 1):
            weight = len(of_part[1]) / size
            with nullcontext() if part == parts or processes == 1 else self.forward.no_sync():
                losses, correct = self.losses(*of_part)
                (processes * weight * losses["loss"]).backward()  # the gradients are averaged over the processes
            outcome = outcome + torch.cat([weight * torch.stack(list(losses.values())).detach(), correct])
        self.optimizer.step()
        outcome = distributed.total(outcome)
        return StepResult(dict(zip(losses, outcome, strict=False)), outcome[len(losses) :], size)

    def losses(self, images: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The loss and its terms, and the correct answers of each student and of the online teacher."""
        with autocast(self.device, self.precision):
            student_logits, teacher_logits = self.forward(images)
            pretrained_logits = None
            if self.teacher is not None:
                with torch.no_grad():
                    pretrained_logits = self.teacher(images)
        losses = self.objective(
            student_logits, teacher_logits, targets, pretrained_logits=pretrained_logits, rampup=self.rampup
        )
        with torch.no_grad():
            correct = (all_logits(student_logits, teacher_logits).argmax(-1) == targets).sum(1)
        return losses, correct

    def train_one_epoch(
        self, batches: AugmentedBatches, job: Job, meta: dict[str, Any] | None = None
    ) -> TrainingScores:
        """One pass over `batches`, or the rest of one; waits for the device every print_freq steps, to save, and last.

        Args:
            meta: of the checkpoints within the epoch and after its last step; without it there are none.
        Raises:
            UserError: a loss is not finite.
            SystemExit: a signal asked for it, and the steps so far are saved.
        """
        self.learner.train()
        means, steps = self.means, len(batches)
        title = f"epoch {self.epoch}/{self.num_epochs}"
        total, done = batches.num_images, means.images
        with tqdm(desc=title, total=total, initial=done, unit=" images", leave=False, disable=None) as bar:
            for images, targets in batches:
                moment = self.epoch, (means.steps + 1) / steps
                self._set(self.schedule.rate(*moment), self.schedule.rampup(*moment))
                result = self.train_step(images, targets)
                means.add(result)
                bar.update(result.size)
                if means.steps % self.print_freq == 0:
                    self._settle(steps, job)
                    loss = f"{means.losses[-1][0]:.4f}"
                    bar.set_postfix(loss=loss)
                    if bar.disable and means.steps < steps:
                        job.logger.info(f"{title}, step {means.steps}/{steps}: loss {loss}")
                interrupted = _interrupted()
                if meta and (interrupted or time.monotonic() - self.saved_at >= self.save_every):
                    self._settle(steps, job)
                    self._save_last(job, meta, self._progress(batches))
                    if interrupted:
                        saved = f"{title}, step {means.steps}/{steps} is saved"
                        interruption.message = f"{saved}; {job.how_to_go_on}"
                        interruption.end()
        self._settle(steps, job)
        distributed.copy_buffers_of_first(self.learner)
        # Evaluation may take longer than a scheduler waits after its signal. Broken weights are left for it to report.
        if meta and all(value.isfinite().all() for value in self.learner.state_dict().values()):
            self._save_last(job, meta, self._progress(batches))
        self.means = EpochMeans()
        return means.scores(self.learner)

    def _progress(self, batches: AugmentedBatches) -> dict[str, Any]:
        """The state of the epoch in progress, for a checkpoint."""
        return {"position": batches.position, "random": random_state(self.device), **self.means.state_dict()}

    def _settle(self, steps: int, job: Job) -> None:
        """Wait for the device, and check the losses since the last time."""
        for step, terms in self.means.settle().items():
            self._check_finite(terms, f"step {step}", self.schedule.rate(self.epoch, step / steps), job.last)

    def _set(self, rate: float, rampup: float) -> None:
        if self.on_device:
            rate, rampup = (memory.fill_(value) for memory, value in zip(self.on_device, (rate, rampup), strict=True))
        self.rampup = rampup
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def fit(
        self, train: AugmentedBatches, val: Batches, job: Job, meta: dict[str, Any], keep_initial: bool = False
    ) -> None:
        """Train from where the run is to the last epoch; save before and after each evaluation, and as flags say.

        Args:
            meta: goes into every checkpoint; says how to build a student.
            keep_initial: the students as they are before training may turn out the best.

        Raises:
            UserError: a loss is not finite; model_best.pt is as it was, last.pt only if it was a loss in training.
            SystemExit: a signal asked for it.
        """
        self._counted_at = time.perf_counter()
        with interruption.deferred():
            if keep_initial and self.best is None:
                self.scores = self._evaluate(val)
                if not all(map(math.isfinite, flatten(plain(self.scores)).values())):
                    raise UserError("the logits of the student to refine are not finite on the validation set")
                self._save_last(job, meta)  # model_best.pt alone would not be a run to resume
                self._keep_best(job, meta)
            started, first = time.perf_counter(), self.epoch
            self.saved_at = time.monotonic()
            while self.epoch < self.num_epochs and not _interrupted():
                epoch_started, images = time.perf_counter(), train.num_images - self.means.images
                self._begin_epoch(train)
                train_scores = self.train_one_epoch(train, job, meta)
                speed = images / (time.perf_counter() - epoch_started)
                interruption.message = (
                    f"epoch {self.epoch}/{self.num_epochs} is saved, not evaluated; {job.how_to_go_on}"
                )
                self.scores = self._evaluate(val)
                interruption.message = job.how_to_go_on
                rate = self.schedule.rate(self.epoch)
                self._check_finite(flatten(plain(self.scores)), "on the validation set", rate, job.best)

                self._keep_best(job, meta)
                job.add_metrics(self.epoch, rate, plain(train_scores), plain(self.scores))
                self._save_last(job, meta)
                eta = (time.perf_counter() - started) / (self.epoch - first) * (self.num_epochs - self.epoch)
                job.logger.info(
                    f"epoch {self.epoch}/{self.num_epochs}: loss {train_scores.loss['total']:.4f}, "
                    f"validation {self.scores}, best {self.best.accuracy:.2f}; "
                    + (f"{speed:,.0f} images/s, " if images else "")  # a resumed run may have had its last step
                    + f"{timedelta(seconds=round(eta))} left"
                )
            self._count_seconds()
            if self.epoch == self.num_epochs:
                interruption.message = f"training is complete, its report is not; {job.how_to_go_on}"

    def _evaluate(self, val: Batches) -> Scores:
        """Scores on the validation set.

        Raises:
            SystemExit: a signal asked for it.
        """
        scores = evaluate(self.learner, _until_interrupted(val))
        if _interrupted():
            interruption.end()
        return scores

    def _begin_epoch(self, train: AugmentedBatches) -> None:
        """Go to the next epoch, or back into the one that a resumed run had begun."""
        self.epoch += 1
        begun, self._begun = self._begun, None
        train.set_epoch(self.epoch, begun["position"] if begun else 0)
        if begun:
            set_random_state(begun["random"])
        else:
            # What dropout draws, a resumed run draws again, and each process for itself.
            torch.manual_seed(epoch_seed(self.seed, self.epoch) + distributed.rank() * 2**40)

    def resume(self, path: Path, meta: dict[str, Any], force: bool = False) -> None:
        """Go on from a training checkpoint, with the model_best.pt beside it.

        Args:
            force: even from other images, and with another teacher or student to refine.

        Raises:
            UserError: they cannot be read or do not belong together, or the run had other flags, inputs or more epochs.
        """
        content = checkpoint.load_checkpoint(path)
        was, config = content["meta"], content["meta"]["config"]
        if name := changed_flag(config, meta["config"]):
            before, now = (as_typed(name, values.get(name)) for values in (config, meta["config"]))
            raise UserError(f"{path} was trained {before}, not {now}: resume it {before}")
        if not force:
            inputs.check_same(was.get("inputs", {}), meta.get("inputs", {}), path)
        if any(was[key] != meta[key] for key in ("classes", *(() if force else ("mean", "std")))):
            raise UserError(f"{path} was trained on other data: resume it with the same --data_dir")
        load_weights(self.learner, content["model"], str(path))
        checkpoint.load_momentum(self.optimizer, content["optimizer"], str(path))
        self.epoch = content["epoch"]
        self.scores = Scores.from_plain(content["scores"]) if content["scores"] else None
        self.best = Best.from_plain(content["best"]) if content["best"] else None
        self.seconds = content.get("seconds", 0.0)
        if content.get("progress"):  # which checkpoints of older runs do not know
            self._begun = content["progress"]
            self.means.load_state_dict(self._begun, self.device)
        begun = self.epoch + bool(self.means.steps)
        if self.best:
            path_of_best = path.with_name("model_best.pt")
            best_epoch = checkpoint.load_checkpoint(path_of_best)["epoch"]
            # A run that was killed between its two writes left the best of the epoch after: it comes again.
            if best_epoch not in (self.best.epoch, self.epoch + 1):
                raise UserError(f"{path_of_best} is of another epoch than the best one of {path}: resume from last.pt")
            begun = max(begun, best_epoch)
        if begun > self.num_epochs:
            raise UserError(
                f"{path} is of epoch {begun} already: give --num_epochs {begun} or more, or start over with --reset"
            )
        self.differences = _differences(content.get("environment", {}), self.environment)

    @property
    def reached(self) -> str:
        """For a log line: "epoch 3 and 17 steps of the next"."""
        steps = f" and {self.means.steps} steps of the next" if self.means.steps else ""
        return f"epoch {self.epoch}{steps}{self.differences}"

    @property
    def best_student(self) -> nn.Module:
        return self.learner.students[self.best.student]

    def load_best(self, job: Job) -> None:
        """Put the weights of the best epoch back into the learner."""
        distributed.wait_for_all()  # one of them writes it
        content = checkpoint.load_checkpoint(job.best)
        load_weights(self.learner, content["model"], str(job.best))
        self.best = Best.from_plain(content["best"])

    def _keep_best(self, job: Job, meta: dict[str, Any]) -> None:
        best = Best.of(self.epoch, self.scores)
        if self.best is None or best.rank > self.best.rank:
            self.best = best
            if job.writes:
                checkpoint.save(job.best, self._state(meta))

    def _save_last(self, job: Job, meta: dict[str, Any], progress: dict[str, Any] | None = None) -> None:
        if job.writes:
            checkpoint.save(job.last, self._state(meta, progress))
        self.saved_at = time.monotonic()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._counted_at = self.seconds + now - self._counted_at, now

    def _state(self, meta: dict[str, Any], progress: dict[str, Any] | None = None) -> dict[str, Any]:
        """A training checkpoint; `progress` is of an epoch that is not done yet."""
        self._count_seconds()
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        return {
            "kind": checkpoint.CHECKPOINT,
            "epoch": self.epoch - 1 if progress else self.epoch,
            "progress": progress,
            "model": self.learner.state_dict(),
            "optimizer": optimizer,
            "scores": self.scores and plain(self.scores),
            "best": self.best and plain(self.best),
            "environment": self.environment,
            "seconds": self.seconds,
            "meta": meta,
        }

    def _check_finite(self, losses: dict[str, float], where: str, rate: float, good: Path) -> None:
        if not all(map(math.isfinite, losses.values())):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            kept = f"{good} is the last good checkpoint" if good.exists() else "no epoch was finished"
            raise UserError(
                f"the loss is not finite in epoch {self.epoch}, {where}: {terms}, learning rate {rate:g}; {kept}: "
                "lower --lr, --lambda or --miu, raise --warmup_epochs, or try --precision fp32"
            )


def _interrupted() -> bool:
    """Whether a signal has reached any process: all of them see it at the same point."""
    if signal := distributed.largest(interruption.pending):
        interruption.pending = signal
    return bool(signal)


def _until_interrupted(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield batch
        if interruption.pending:
            return


def _differences(was: dict[str, Any], now: dict[str, Any]) -> str:
    """For a log line: what the results of a resumed run may differ by in their last bits."""
    changed = [f"{name} {now[name]} (was {was[name]})" for name in now if name in was and was[name] != now[name]]
    return f", with {', '.join(changed)}: results may differ in the last bits" if changed else ""
