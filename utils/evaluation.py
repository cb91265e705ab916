"""How good networks are: accuracies and losses of students and online teacher over a split."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batches
from model.online import Students
from utils import distributed

Scores = dict[str, dict[str, Any]]
"""{"accuracy": ..., "loss": ...}, accuracies in %; each with "students", a list, and perhaps "online_teacher"."""


def evaluate(learner: Students, batches: Batches) -> Scores:
    """Top-1 accuracy in % and cross-entropy of every student and of the online teacher, in float32 as exported.

    Of the batches of all processes, which each have their share of the images.

    The accuracy of a network that gives a logit that is not finite is NaN.
    """
    learner.eval()
    count = correct = loss = 0
    with torch.inference_mode():
        for images, targets in batches:
            logits = all_logits(*learner(images))
            count += len(targets)  # not batches.num_images, of which some may turn out to be damaged
            hits = (logits.argmax(-1) == targets).float()
            correct = correct + hits.masked_fill(~logits.isfinite().all(-1), math.nan).sum(1)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
            loss = loss + losses.view(len(logits), -1).sum(1)
    own = torch.tensor([count, *correct.tolist(), *loss.tolist()], dtype=torch.float64)
    count, *totals = distributed.total(own).tolist()
    correct, loss = totals[: len(totals) // 2], totals[len(totals) // 2 :]
    return {
        "accuracy": by_network(learner, [100 * hits / count for hits in correct]),
        "loss": by_network(learner, [total / count for total in loss]),
    }


def top1(network: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy in % of one network."""
    return evaluate(Students([network]), batches)["accuracy"]["students"][0]


def all_logits(student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """(N, B, K), or (N + 1, B, K) with the online teacher's logits last."""
    return student_logits if teacher_logits is None else torch.cat([student_logits, teacher_logits[None]])


def by_network(learner: Students, values: list[float]) -> dict[str, Any]:
    """A value for each row of `all_logits`, by whose it is."""
    count = len(learner.students)
    return {"students": values[:count]} | ({"online_teacher": values[count]} if len(values) > count else {})


def summarize(scores: Scores) -> str:
    """For a log line: "students 91.20 91.52, online teacher 92.31"."""
    accuracy = scores["accuracy"]
    text = ("students " if len(accuracy["students"]) > 1 else "") + " ".join(f"{x:.2f}" for x in accuracy["students"])
    return text + (f", online teacher {accuracy['online_teacher']:.2f}" if "online_teacher" in accuracy else "")
