"""Accuracies and losses over a split, and which student they make the best."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from data.loader import Batches
from data.sources import Split
from model.online import OnlineTeacher, Students
from utils.metrics import TOP5_ABOVE, Best, ByNetwork, Scores, accuracy, evaluate
from utils.report import by_class


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
        assert scores.accuracy.students[i] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())
        assert scores.loss.students[i] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-4)
    assert scores.accuracy.online_teacher == pytest.approx(
        100 * (teacher_logits.argmax(1) == targets).float().mean().item()
    )
    assert scores.loss.online_teacher == pytest.approx(F.cross_entropy(teacher_logits, targets).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("accuracies", "losses", "best"), [([1, 3, 2], [0, 9, 0], 1), ([3, 3, 2], [5, 4, 0], 1), ([3, 3], [4, 5], 0)]
)
def test_best_student_has_the_highest_accuracy_then_the_lowest_loss(accuracies, losses, best):
    scores = Scores(ByNetwork(accuracies), ByNetwork(losses))
    assert Best.of(1, scores, range(len(accuracies))).student == best


def test_best_student_may_be_chosen_among_some():
    scores = Scores(ByNetwork([3, 1, 2]), ByNetwork([0, 0, 0]))
    assert [Best.of(1, scores, candidates).student for candidates in ([2], [1, 2], range(3))] == [2, 2, 0]


class Fixed(nn.Module):
    """Gives the row of `logits` whose index the first pixel of an image is."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits[x[:, 0, 0, 0].round().long()]


def indexed(targets, batch_size=4):
    """An image for each target, whose first pixel is its index."""
    images = np.zeros((len(targets), 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(targets))
    return Batches(Split(images, targets), batch_size, (0,) * 3, (1 / 255,) * 3, torch.device("cpu"))


def test_top_k_against_a_plain_sort():
    """With many equal logits, among which the smaller index is ahead."""
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 20, 60)
    logits = generator.integers(0, 5, (60, 20)).astype(np.float32)
    ahead = [sorted(range(20), key=lambda k, row=row: (-row[k], k)) for row in logits]
    ranks = np.array([order.index(target) for order, target in zip(ahead, targets, strict=True)])
    found = accuracy(Fixed(torch.from_numpy(logits)), indexed(targets))
    assert found.top1 == pytest.approx(100 * np.mean(ranks < 1))
    assert found.top5 == pytest.approx(100 * np.mean(ranks < 5))
    assert 0 < found.top1 < found.top5 < 100


def test_top_5_is_for_more_than_ten_classes_and_for_every_network():
    targets = np.zeros(4, int)
    few, many = (Fixed(torch.randn(4, count)) for count in (TOP5_ABOVE, TOP5_ABOVE + 1))
    assert accuracy(few, indexed(targets)).top5 is None
    assert "top-5" not in str(accuracy(few, indexed(targets)))
    scores = evaluate(Students([many, many]), indexed(targets))
    assert len(scores.top5.students) == 2
    assert [row.top5 for row in scores.accuracies()] == scores.top5.students
    assert str(scores).count("top-5") == 1


def test_top_5_of_logits_that_are_not_finite_is_none():
    logits = torch.zeros(4, 12)
    logits[1, 7] = float("nan")
    found = accuracy(Fixed(logits), indexed(np.zeros(4, int)))
    assert np.isnan(found.top1)
    assert np.isnan(found.top5)


def test_disagreement_is_the_mean_over_pairs_of_students():
    answers = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 1, 0, 2], [0, 2, 2, 1, 0]])
    learner = Students([Fixed(F.one_hot(row, 3).float()) for row in answers])
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = 100 * np.mean([(answers[a] != answers[b]).float().mean() for a, b in pairs])
    scores = evaluate(learner, indexed(np.zeros(5, int), batch_size=2))
    assert scores.disagreement == pytest.approx(expected)
    assert evaluate(Students([learner.students[0]]), indexed(np.zeros(5, int))).disagreement is None


def test_confusion_counts_images_by_class_and_answer():
    targets, answers = np.array([0, 0, 1, 2, 2, 2, 0]), torch.tensor([0, 1, 1, 0, 2, 2, 0])
    learner = Students([Fixed(torch.zeros(7, 4)), Fixed(F.one_hot(answers, 4).float())])
    counts = evaluate(learner, indexed(targets, batch_size=3), confusion_of=1).confusion
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert by_class(counts, list("abcd")) == [
        ("a", 3, pytest.approx(200 / 3)),
        ("b", 1, 100.0),
        ("c", 3, pytest.approx(200 / 3)),
        ("d", 0, None),
    ]
