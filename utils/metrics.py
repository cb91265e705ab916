"""Accuracies and losses of the students and the online teacher, over a split or an epoch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batches
from model.online import Students
from utils import distributed
from utils.errors import UserError

TOP5_ABOVE = 10  # classes; top-5 says little about fewer


class Accuracy(NamedTuple):
    """Top-1 and top-5 in %: NaN if logits are not finite; top-5 is None for at most ten classes."""

    top1: float
    top5: float | None = None

    def __str__(self) -> str:
        return f"{self.top1:.2f} %" + ("" if self.top5 is None else f" (top-5 {self.top5:.2f} %)")


@dataclass(frozen=True)
class ByNetwork:
    """A value for each student, and one for the online teacher, if there is one."""

    students: Sequence[float]
    online_teacher: float | None = None

    @classmethod
    def of(cls, learner: Students, values: Sequence[float]) -> "ByNetwork":
        """From one value for each row of `all_logits`."""
        count = len(learner.students)
        return cls(values[:count], *values[count:])


@dataclass(frozen=True)
class Scores:
    """Scores of the networks of a learner on a split.

    Attributes:
        accuracy: top-1 in %; NaN for a network with non-finite logits.
        loss: cross-entropy.
        top5: top-5 accuracy in %; None for at most ten classes.
        disagreement: % of the images for which two students predict different classes, averaged over all pairs.
        confusion: (K, K) counts of images by target (row) and class that one student predicts (column), if asked for.
    """

    accuracy: ByNetwork
    loss: ByNetwork
    top5: ByNetwork | None = None
    disagreement: float | None = None
    confusion: np.ndarray | None = field(default=None, compare=False)

    def accuracies(self) -> list[Accuracy]:
        """Accuracies of the students and, last, of the online teacher if there is one."""
        columns = [[*values.students, values.online_teacher] for values in (self.accuracy, self.top5) if values]
        rows = [Accuracy(*row) for row in zip(*columns, strict=True)]
        return [row for row in rows if row.top1 is not None]

    def __str__(self) -> str:
        """For a log line: "students 91.20 91.52, online teacher 92.31", with top-5 in parentheses if there is any."""
        rows, count = self.accuracies(), len(self.accuracy.students)
        text = ("students " if count > 1 else "") + _joined(rows[:count])
        return text + (f", online teacher {_joined(rows[count:])}" if rows[count:] else "")


@dataclass(frozen=True)
class TrainingScores:
    """Averages over an epoch: the loss, named "total", and its terms; top-1 accuracy in %."""

    loss: dict[str, float]
    accuracy: ByNetwork


@dataclass(frozen=True)
class Best:
    """The best student so far: the highest accuracy on the validation set and, among equals, the lowest loss."""

    epoch: int
    student: int
    accuracy: float
    loss: float

    @classmethod
    def of(cls, epoch: int, scores: Scores, candidates: Sequence[int]) -> "Best":
        """The best one of the candidates (indices of students) in an epoch."""
        rows = list(zip(scores.accuracy.students, scores.loss.students, strict=True))
        return max((cls(epoch, i, *rows[i]) for i in candidates), key=lambda best: best.rank)

    @property
    def rank(self) -> tuple[float, float]:
        return self.accuracy, -self.loss


def flatten(values: dict[str, Any]) -> dict[str, float]:
    """Tensorboard names: {"accuracy": {"students": [a, b]}} -> {"accuracy/student_1": a, "accuracy/student_2": b}."""
    scalars = {}
    for name, value in values.items():
        if isinstance(value, dict):
            scalars |= {f"{name}/{key}": x for key, x in flatten(value).items()}
        elif isinstance(value, list):
            scalars |= {f"{name.removesuffix('s')}_{i}": x for i, x in enumerate(value, start=1)}
        else:
            scalars[name] = value
    return scalars


def evaluate(
    learner: Students, batches: Batches | Iterable[tuple[Tensor, Tensor]], confusion_of: int | None = None
) -> Scores:
    """Score every student and the online teacher, in float32 as exported, on the batches of all processes.

    An image counts for top-k when fewer than k classes are ahead of its target: those with a larger logit, and those
    with an equal logit and a smaller index.

    Args:
        confusion_of: index of the student to count the confusion matrix of.

    Raises:
        UserError: no image can be read.
    """
    learner.eval()
    students, totals, classes, counts = len(learner.students), 0, 0, 0
    with torch.inference_mode():
        for images, targets in batches:
            logits = all_logits(*learner(images)[:2])
            ranks = _ranks(logits, targets)
            hits = torch.stack([ranks < 1, ranks < 5]).float()
            hits = hits.masked_fill(~logits.isfinite().all(-1), math.nan).sum(-1)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
            losses = losses.view(len(logits), -1).sum(1)
            predictions = logits[:students].argmax(-1)
            differing = (predictions[:, None] != predictions).sum() / max(1, students * (students - 1))
            # The images are counted here because some of batches.num_images may be damaged.
            count, differing = losses.new_full(losses.shape, len(targets)), differing.expand(losses.shape)
            totals, classes = totals + torch.stack([count, differing, *hits, losses]), logits.shape[-1]
            if confusion_of is not None:
                cells = targets * classes + predictions[confusion_of]
                counts = counts + torch.bincount(cells, minlength=classes**2).cpu()
    # A process without a readable image has no totals.
    share = (totals.double().cpu(), classes, counts) if classes else None
    found = [part for part in distributed.gathered(share) if part]
    if not found:
        raise UserError("none of the images to evaluate on can be read: repair them")
    (count, differing, top1, top5, loss), classes = sum(part[0] for part in found), found[0][1]
    return Scores(
        accuracy=ByNetwork.of(learner, (100 * top1 / count).tolist()),
        loss=ByNetwork.of(learner, (loss / count).tolist()),
        top5=ByNetwork.of(learner, (100 * top5 / count).tolist()) if classes > TOP5_ABOVE else None,
        disagreement=(100 * differing / count)[0].item() if students > 1 else None,
        confusion=None if confusion_of is None else sum(part[2] for part in found).view(classes, classes).numpy(),
    )


def accuracy(network: nn.Module, batches: Batches) -> Accuracy:
    """Accuracy of one network, (B, 3, H, W) -> (B, K)."""
    return evaluate(Students([network]), batches).accuracies()[0]


def all_logits(student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """Stack logits to (N, B, K), or (N + 1, B, K) with the online teacher's last."""
    return student_logits if teacher_logits is None else torch.cat([student_logits, teacher_logits[None]])


class StepResult(NamedTuple):
    """A training step on the whole batch, of all processes; the tensors are on the device."""

    losses: dict[str, Tensor]  # the loss and its terms, scalars
    correct: Tensor  # (networks,) counts of correct predictions, in the order of `all_logits`
    size: int  # images


@dataclass
class EpochMeans:
    """Averages the results of an epoch's training steps over its images."""

    names: list[str] = field(default_factory=list)  # of the loss and its terms
    losses: list[list[float]] = field(default_factory=list)  # of each settled step
    sizes: list[int] = field(default_factory=list)  # images of each step
    correct: Tensor | int = 0  # as in `StepResult`, of all steps
    _pending: list[Tensor] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.sizes)

    @property
    def images(self) -> int:
        return sum(self.sizes)

    def add(self, result: StepResult) -> None:
        """Add a step, without waiting for the device."""
        self.names = list(result.losses)
        self._pending.append(torch.stack(list(result.losses.values())))
        self.correct = self.correct + result.correct
        self.sizes.append(result.size)

    def settle(self) -> dict[int, dict[str, float]]:
        """Wait for the device. Returns the losses of each step (from 1) since the last time."""
        rows = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        self.losses += rows
        named = (dict(zip(self.names, row, strict=True)) for row in rows)
        return dict(enumerate(named, start=self.steps - len(rows) + 1))

    def scores(self, learner: Students) -> TrainingScores:
        """The averages; the steps must be settled."""
        weights = torch.tensor(self.sizes, dtype=torch.float64) / self.images
        averages = (weights @ torch.tensor(self.losses, dtype=torch.float64)).tolist()
        names = ("total" if name == "loss" else name for name in self.names)
        accuracies = [100 * hits / self.images for hits in self.correct.tolist()]
        return TrainingScores(dict(zip(names, averages, strict=True)), ByNetwork.of(learner, accuracies))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint; the steps must be settled."""
        return {
            "names": self.names,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "sizes": torch.tensor(self.sizes),
            "correct": self.correct.cpu(),
        }


def _ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of classes ahead of the target in each row of logits: (N, B, K) and (B,) -> (N, B)."""
    own = logits.gather(-1, targets.expand(len(logits), -1)[..., None])
    earlier = torch.arange(logits.shape[-1], device=logits.device) < targets[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1)


def _joined(rows: Sequence[Accuracy]) -> str:
    text = " ".join(f"{row.top1:.2f}" for row in rows)
    return text if rows[0].top5 is None else f"{text} (top-5 {' '.join(f'{row.top5:.2f}' for row in rows)})"
