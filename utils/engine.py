"""The training loop, shared by main.py and finetune.py."""

import argparse
import math
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.loader import AugmentedBatches, Batches, epoch_seed
from model.online import Students
from utils import checkpoint
from utils.device import COMPILED, GRAPH, PLAIN, autocast
from utils.errors import UserError
from utils.graphs import GraphedStep
from utils.job import Job, flatten
from utils.losses import online_distillation

Scores = dict[str, dict[str, Any]]
"""{"accuracy": ..., "loss": ...}, accuracies in %; each with "students", a list, and perhaps "online_teacher"."""

# Flags that a resumed run may give anew: where, how long and how precisely it computes, but not what. (The length
# shapes a cosine schedule, and is fixed there.)
MAY_CHANGE = {
    "num_epochs", "job_dir", "data_dir", "teacher_dir", "refine", "pruned", "eval_batch_size", "device", "precision",
    "compile", "workers", "print_freq",
}  # fmt: skip


class Trainer:
    """Trains a learner (Students or OnlineTeacher) with the objective that the flags describe.

    Args:
        teacher: the pretrained teacher, frozen and in eval mode, or None.
        execution: how to run a step, as `utils.device.pick_execution` chose.

    Attributes:
        epoch: epochs done.
        best: epoch, student (its index), accuracy and loss of the best student on the validation set so far.
    """

    def __init__(
        self,
        learner: Students,
        teacher: nn.Module | None,
        args: argparse.Namespace,
        device: torch.device,
        precision: str,
        execution: str = PLAIN,
    ):
        self.learner = learner.to(device, memory_format=torch.channels_last)
        self.teacher = teacher if args.miu else None
        self.device, self.precision, self.execution = device, precision, execution
        self.num_epochs, self.print_freq, self.seed = args.num_epochs, args.print_freq, args.seed
        self.objective = partial(
            online_distillation, lam=args.lam, temperature=args.temperature, miu=args.miu, reduction=args.kl_reduction
        )
        self.optimizer = torch.optim.SGD(
            learner.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
        )
        if args.scheduler == "step":
            self.learning_rate = partial(step_rate, args.lr, args.lr_decay_step)
        else:
            self.learning_rate = partial(cosine_rate, args.lr, args.num_epochs)
        self.warmup_epochs = args.warmup_epochs
        graphed = execution in (GRAPH, COMPILED)
        if graphed:
            self.train_step = GraphedStep(self.train_step)
        self.forward = torch.compile(self.learner) if execution == COMPILED else self.learner
        # A recorded step reads its learning rate from memory.
        self.lr_on_device = torch.zeros((), device=device) if graphed else None
        self.epoch, self.best = 0, None

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of `step` (from 1) of the `steps` of the current epoch; it rises linearly to warm up.

        ResNets this deep do not start to learn at their full rate (He et al., arXiv 1512.03385, section 4.2), and the
        distillation terms make the first steps steeper still: without a warm-up, ResNet-56 students diverge.
        """
        progress = self.epoch - 1 + step / steps
        warm = min(1.0, progress / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.learning_rate(self.epoch) * warm

    def train_step(self, images: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One step of SGD. Returns the loss and its terms, and the correct answers of each student and the teacher."""
        with autocast(self.device, self.precision):
            student_logits, teacher_logits = self.forward(images)
            pretrained_logits = None
            if self.teacher is not None:
                with torch.no_grad():
                    pretrained_logits = self.teacher(images)
        losses = self.objective(student_logits, teacher_logits, targets, pretrained_logits=pretrained_logits)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        with torch.no_grad():
            correct = (_all_logits(student_logits, teacher_logits).argmax(-1) == targets).sum(1)
        return {name: value.detach() for name, value in losses.items()}, correct

    def train_one_epoch(self, batches: Batches, job: Job) -> Scores:
        """One pass over `batches`; waits for the device every print_freq steps and at the end, never in between.

        Returns:
            Scores averaged over the images, each as it was in its own step; the losses are "total" and its terms.

        Raises:
            UserError: a loss is not finite.
        """
        self.learner.train()
        rows, pending, sizes, correct = [], [], [], 0
        title = f"epoch {self.epoch}/{self.num_epochs}"

        def settle() -> None:
            for row in torch.stack(pending).tolist():  # the one place that waits for the device
                rows.append(row)
                rate = self.rate(len(rows), len(batches))
                self._check_finite(dict(zip(losses, row, strict=True)), f"step {len(rows)}", rate, job)
            pending.clear()

        with tqdm(total=batches.num_images, desc=title, unit=" images", leave=False, disable=None) as bar:
            for step, (images, targets) in enumerate(batches, start=1):
                self._set_rate(self.rate(step, len(batches)))
                losses, hits = self.train_step(images, targets)
                pending.append(torch.stack(list(losses.values())))
                sizes.append(len(targets))
                correct = correct + hits
                bar.update(len(targets))
                if step % self.print_freq == 0:
                    settle()
                    bar.set_postfix(loss=f"{rows[-1][0]:.4f}")
                    if bar.disable and step < len(batches):
                        job.logger.info(f"{title}, step {step}/{len(batches)}: loss {rows[-1][0]:.4f}")
        if pending:
            settle()
        names = ["total" if name == "loss" else name for name in losses]
        weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        averages = weights @ torch.tensor(rows, dtype=torch.float64)
        return {
            "loss": dict(zip(names, averages.tolist(), strict=True)),
            "accuracy": _by_network(self.learner, [100 * hits / sum(sizes) for hits in correct.tolist()]),
        }

    def _set_rate(self, rate: float) -> None:
        if self.lr_on_device is not None:
            rate = self.lr_on_device.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def fit(
        self, train: AugmentedBatches, val: Batches, job: Job, meta: dict[str, Any], keep_initial: bool = False
    ) -> None:
        """Train from the epoch reached to the last, with a checkpoint after each.

        Args:
            meta: goes into every checkpoint; says how to build a student.
            keep_initial: the students as they are before training may turn out the best.

        Raises:
            UserError: a loss is not finite. The checkpoints on the disk are those of the last good epoch.
        """
        if keep_initial and self.epoch == 0:
            scores = evaluate(self.learner, val)
            if not all(map(math.isfinite, flatten(scores).values())):
                raise UserError("the logits of the student to refine are not finite on the validation set")
            self._keep_best(scores, job, meta)
        started, first = time.perf_counter(), self.epoch
        while self.epoch < self.num_epochs:
            self.epoch += 1
            train.set_epoch(self.epoch)
            torch.manual_seed(epoch_seed(self.seed, self.epoch))  # what dropout draws, a resumed run draws again
            epoch_started = time.perf_counter()
            train_scores = self.train_one_epoch(train, job)
            images_per_second = train.num_images / (time.perf_counter() - epoch_started)
            scores = evaluate(self.learner, val)
            rate = self.rate(len(train), len(train))
            self._check_finite(flatten(scores), "on the validation set", rate, job)

            self._keep_best(scores, job, meta)
            job.add_metrics(self.epoch, rate, train_scores, scores)
            checkpoint.save(job.last, self._state(scores, meta))
            eta = (time.perf_counter() - started) / (self.epoch - first) * (self.num_epochs - self.epoch)
            job.logger.info(
                f"epoch {self.epoch}/{self.num_epochs}: loss {train_scores['loss']['total']:.4f}, "
                f"validation {_accuracies(scores)}, best {self.best['accuracy']:.2f}; "
                f"{images_per_second:,.0f} images/s, {timedelta(seconds=round(eta))} left"
            )

    def resume(self, path: Path, meta: dict[str, Any]) -> None:
        """Go on from a training checkpoint, with the model_best.pt beside it.

        Raises:
            UserError: they cannot be read or do not belong together, or the run had other flags.
        """
        content = checkpoint.load_checkpoint(path)
        was, now = content["meta"]["config"], meta["config"]
        fixed = set(now) - MAY_CHANGE | ({"num_epochs"} if now["scheduler"] == "cosine" else set())
        for name in sorted(fixed):
            if was.get(name) != now[name]:
                raise UserError(
                    f"{path} was trained with --{name} {_as_flag(was.get(name))}, not {_as_flag(now[name])}: resume it "
                    f"with --{name} {_as_flag(was.get(name))}"
                )
        if any(content["meta"][key] != meta[key] for key in ("classes", "mean", "std")):
            raise UserError(f"{path} was trained on other data: resume it with the same --data_dir")
        checkpoint.load_weights(self.learner, content["model"], str(path))
        checkpoint.load_momentum(self.optimizer, content["optimizer"], str(path))
        self.epoch, self.best = content["epoch"], content["best"]
        best = path.with_name("model_best.pt")
        # A run that was killed between its two writes left the best of the epoch after: it comes again.
        if checkpoint.load_checkpoint(best)["epoch"] not in (self.best["epoch"], self.epoch + 1):
            raise UserError(f"{best} is of another epoch than the best one of {path}: resume from last.pt")

    @property
    def best_student(self) -> nn.Module:
        return self.learner.students[self.best["student"]]

    def load_best(self, job: Job) -> None:
        """Put the weights of the best epoch back into the learner."""
        content = checkpoint.load_checkpoint(job.best)
        checkpoint.load_weights(self.learner, content["model"], str(job.best))
        self.best = content["best"]

    def _keep_best(self, scores: Scores, job: Job, meta: dict[str, Any]) -> None:
        student = checkpoint.best_of(scores)
        accuracy, loss = (scores[kind]["students"][student] for kind in ("accuracy", "loss"))
        if self.best is None or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"]):
            self.best = {"epoch": self.epoch, "student": student, "accuracy": accuracy, "loss": loss}
            checkpoint.save(job.best, self._state(scores, meta))

    def _state(self, scores: Scores, meta: dict[str, Any]) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        return {
            "kind": checkpoint.CHECKPOINT,
            "epoch": self.epoch,
            "model": self.learner.state_dict(),
            "optimizer": optimizer,
            "scores": scores,
            "best": self.best,
            "meta": meta,
        }

    def _check_finite(self, losses: dict[str, float], where: str, rate: float, job: Job) -> None:
        if not all(map(math.isfinite, losses.values())):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            kept = f"{job.last} is the last good checkpoint" if job.last.exists() else "no epoch was finished"
            raise UserError(
                f"the loss is not finite in epoch {self.epoch}, {where}: {terms}, learning rate {rate:g}; {kept}: "
                "lower --lr, --lambda or --miu, raise --warmup_epochs, or try --precision fp32"
            )


def evaluate(learner: Students, batches: Batches) -> Scores:
    """Top-1 accuracy in % and cross-entropy of every student and of the online teacher, in float32 as exported.

    The accuracy of a network that gives a logit that is not finite is NaN.
    """
    learner.eval()
    count = correct = loss = 0
    with torch.inference_mode():
        for images, targets in batches:
            logits = _all_logits(*learner(images))
            count += len(targets)  # not batches.num_images, of which some may turn out to be damaged
            hits = (logits.argmax(-1) == targets).float()
            correct = correct + hits.masked_fill(~logits.isfinite().all(-1), math.nan).sum(1)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
            loss = loss + losses.view(len(logits), -1).sum(1)
    return {
        "accuracy": _by_network(learner, [100 * hits / count for hits in correct.tolist()]),
        "loss": _by_network(learner, [total / count for total in loss.tolist()]),
    }


def top1(network: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy in % of one network."""
    return evaluate(Students([network]), batches)["accuracy"]["students"][0]


def step_rate(base: float, decay_epochs: list[int], epoch: int) -> float:
    """Learning rate of `epoch` (from 1): a tenth of it after each of decay_epochs."""
    return base * 0.1 ** sum(epoch > decay for decay in decay_epochs)


def cosine_rate(base: float, num_epochs: int, epoch: int) -> float:
    """Learning rate of `epoch` (from 1): half a cosine from base down to 0 (arXiv 1608.03983, without restarts)."""
    return base / 2 * (1 + math.cos(math.pi * (epoch - 1) / num_epochs))


def _as_flag(value: Any) -> str:
    """A value as it is typed after its flag: [150, 225] is 150 225."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _all_logits(student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """(N, B, K), or (N + 1, B, K) with the online teacher's logits last."""
    return student_logits if teacher_logits is None else torch.cat([student_logits, teacher_logits[None]])


def _by_network(learner: Students, values: list[float]) -> dict[str, Any]:
    """A value for each row of `_all_logits`, by whose it is."""
    count = len(learner.students)
    return {"students": values[:count]} | ({"online_teacher": values[count]} if len(values) > count else {})


def _accuracies(scores: Scores) -> str:
    """For a log line: "students 91.20 91.52, online teacher 92.31"."""
    accuracy = scores["accuracy"]
    text = ("students " if len(accuracy["students"]) > 1 else "") + " ".join(f"{x:.2f}" for x in accuracy["students"])
    return text + (f", online teacher {accuracy['online_teacher']:.2f}" if "online_teacher" in accuracy else "")
