"""How good networks are: accuracies and losses of students and online teacher over a split."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batches
from model.online import Students
from utils import distributed
from utils.errors import UserError

TOP5_ABOVE = 10  # classes; with so few, top-5 says little

Scores = dict[str, Any]
"""{"accuracy": ..., "loss": ...}, with more than ten classes "top5", "disagreement" of several students, "confusion".

Accuracies are in %. The first three are dictionaries with "students", a list, and perhaps "online_teacher".
"""


class Accuracy(NamedTuple):
    """Top-1 and top-5 in %: NaN where logits are not finite; top-5 is None for at most ten classes."""

    top1: float
    top5: float | None = None

    def __str__(self) -> str:
        return f"{self.top1:.2f} %" + ("" if self.top5 is None else f" (top-5 {self.top5:.2f} %)")


def evaluate(learner: Students, batches: Batches, confusion_of: int | None = None) -> Scores:
    """Accuracies in % and cross-entropy of every student and of the online teacher, in float32 as exported.

    Covers the batches of all processes, each of which has its share of the images. An image counts for top-k when
    fewer than k classes are ahead of its own: those with a larger logit, and those with an equal one and a smaller
    index. The accuracy of a network with non-finite logits is NaN. The disagreement is the share of the images, in %,
    for which two students give different classes, averaged over all pairs of students.

    Args:
        confusion_of: index of a student whose confusion matrix is counted, too: "confusion", (K, K) images by their
            class (row) and the class that the student gives them (column).
    """
    learner.eval()
    students, totals, classes, counts = len(learner.students), 0, 0, torch.tensor(0)
    with torch.inference_mode():
        for images, targets in batches:
            logits = all_logits(*learner(images))
            ranks = _ranks(logits, targets)
            hits = torch.stack([ranks < 1, ranks < 5]).float()
            hits = hits.masked_fill(~logits.isfinite().all(-1), math.nan).sum(-1)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
            losses = losses.view(len(logits), -1).sum(1)
            answers = logits[:students].argmax(-1)
            differing = (answers[:, None] != answers).sum() / max(1, students * (students - 1))
            # The images are counted here: of batches.num_images, some may turn out to be damaged.
            count = hits.new_tensor([len(targets)])
            totals, classes = totals + torch.cat([count, differing[None], *hits, losses]), logits.shape[-1]
            if confusion_of is not None:
                cells = targets * classes + answers[confusion_of]
                counts = counts + torch.bincount(cells, minlength=classes**2).cpu()
    # A process without a readable image has no totals.
    share = (totals.double().cpu(), classes, counts) if classes else None
    found = [part for part in distributed.gathered(share) if part]
    if not found:
        raise UserError("none of the images to evaluate on can be read: repair them")
    (count, differing, *rows), classes = sum(part[0] for part in found).tolist(), found[0][1]
    networks = len(rows) // 3
    top1, top5, loss = (rows[i : i + networks] for i in range(0, len(rows), networks))
    scores = {
        "accuracy": by_network(learner, [100 * hits / count for hits in top1]),
        "loss": by_network(learner, [total / count for total in loss]),
    }
    if classes > TOP5_ABOVE:
        scores["top5"] = by_network(learner, [100 * hits / count for hits in top5])
    if students > 1:
        scores["disagreement"] = 100 * differing / count
    if confusion_of is not None:
        scores["confusion"] = sum(part[2] for part in found).view(classes, classes).numpy()
    return scores


def _ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes are ahead of the target in each row of logits: (N, B, K) and (B,) -> (N, B)."""
    own = logits.gather(-1, targets.expand(len(logits), -1)[..., None])
    earlier = torch.arange(logits.shape[-1], device=logits.device) < targets[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1)


def accuracies(scores: Scores) -> list[Accuracy]:
    """Of every student, in order, and last of the online teacher, if there is one."""
    columns = [_listed(scores[key]) for key in ("accuracy", "top5") if key in scores]
    return [Accuracy(*values) for values in zip(*columns, strict=True)]


def accuracy(network: nn.Module, batches: Batches) -> Accuracy:
    """Of one network, (B, 3, H, W) -> (B, K)."""
    return accuracies(evaluate(Students([network]), batches))[0]


def all_logits(student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """(N, B, K), or (N + 1, B, K) with the online teacher's logits last."""
    return student_logits if teacher_logits is None else torch.cat([student_logits, teacher_logits[None]])


def by_network(learner: Students, values: list[float]) -> dict[str, Any]:
    """A value for each row of `all_logits`, by whose it is."""
    count = len(learner.students)
    return {"students": values[:count]} | ({"online_teacher": values[count]} if len(values) > count else {})


def summarize(scores: Scores) -> str:
    """For a log line: "students 91.20 91.52, online teacher 92.31", with top-5 in parentheses if there is any."""
    rows, count = accuracies(scores), len(scores["accuracy"]["students"])
    text = ("students " if count > 1 else "") + _summarize(rows[:count])
    return text + (f", online teacher {_summarize(rows[count:])}" if rows[count:] else "")


def _summarize(rows: list[Accuracy]) -> str:
    text = " ".join(f"{row.top1:.2f}" for row in rows)
    return text if rows[0].top5 is None else f"{text} (top-5 {' '.join(f'{row.top5:.2f}' for row in rows)})"


def _listed(values: dict[str, Any]) -> list[float]:
    return [*values["students"], *([values["online_teacher"]] if "online_teacher" in values else [])]
