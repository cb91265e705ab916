"""Accuracies and losses over a split, and which student they make the best."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from data.loader import Batches
from data.sources import Split
from model.online import OnlineTeacher
from utils.checkpoint import best_of
from utils.evaluation import evaluate


def test_evaluate_against_a_plain_count():
    torch.manual_seed(0)
    learner = OnlineTeacher([model.build("resnet_20_sparse", 4) for _ in range(3)], 4)
    learner.train()(torch.randn(16, 3, 8, 8))
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (25, 8, 8, 3), np.uint8), generator.integers(0, 4, 25))
    scores = evaluate(learner, Batches(split, 10, (0.5,) * 3, (0.2,) * 3, torch.device("cpu")))
    with torch.no_grad():
        images = torch.from_numpy((split.images / 255 - 0.5) / 0.2).permute(0, 3, 1, 2).float()
        student_logits, teacher_logits = learner.eval()(images)
    targets = torch.from_numpy(split.targets)
    for i, logits in enumerate(student_logits):
        assert scores["accuracy"]["students"][i] == pytest.approx(
            100 * (logits.argmax(1) == targets).float().mean().item()
        )
        assert scores["loss"]["students"][i] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-4)
    assert scores["accuracy"]["online_teacher"] == pytest.approx(
        100 * (teacher_logits.argmax(1) == targets).float().mean().item()
    )
    assert scores["loss"]["online_teacher"] == pytest.approx(F.cross_entropy(teacher_logits, targets).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("accuracies", "losses", "best"), [([1, 3, 2], [0, 9, 0], 1), ([3, 3, 2], [5, 4, 0], 1), ([3, 3], [4, 5], 0)]
)
def test_best_student_has_the_highest_accuracy_then_the_lowest_loss(accuracies, losses, best):
    assert best_of({"accuracy": {"students": accuracies}, "loss": {"students": losses}}) == best
