"""Learning rates, and the weight of the online term, by epoch and step."""

import math

import pytest

from tests.training import arguments
from utils.engine import learning_rate, online_rampup


def test_learning_rates():
    flags = ("--lr", 0.1, "--warmup_epochs", 0)
    steps = arguments(*flags, "--num_epochs", 300, "--lr_decay_step", 150, 225)
    rates = [learning_rate(steps, epoch) for epoch in (1, 150, 151, 225, 226, 300)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    short, long = (arguments(*flags, "--scheduler", "cosine", "--num_epochs", count) for count in (4, 300))
    assert [learning_rate(short, epoch) for epoch in (1, 3)] == pytest.approx([0.1, 0.05])
    assert 0 < learning_rate(long, 300) < 1e-5


@pytest.mark.parametrize(
    ("epochs", "expected"), [(300, [150, 225]), (10, [5, 7]), (3, [1, 2]), (2, [1, 2]), (1, [1, 2])]
)
def test_default_decay_is_after_a_half_and_three_quarters(epochs, expected):
    assert arguments("--num_epochs", epochs).lr_decay_step == expected


def test_rate_rises_linearly_over_the_warm_up():
    config = arguments("--lr", 0.4, "--warmup_epochs", 1.5)
    rates = [learning_rate(config, epoch, step / 4) for epoch in (1, 2) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.4 * step / 6 for step in range(1, 7)] + [0.4, 0.4])
    assert learning_rate(arguments("--lr", 0.4, "--warmup_epochs", 0), 1, 0.25) == 0.4


def test_online_term_ramps_up_as_the_paper_of_one_does_it():
    """80 of 300 epochs for ONE; the other methods have the whole weight from the first step."""
    config = arguments("--method", "one", "--num_epochs", 300)
    assert online_rampup(config, 1, 0.0) == pytest.approx(math.exp(-5))
    assert online_rampup(config, 41, 0.0) == pytest.approx(math.exp(-1.25))
    assert online_rampup(config, 80) == online_rampup(config, 200) == 1.0
    assert online_rampup(arguments(), 1, 0.0) == 1.0
    config = arguments("--rampup_epochs", 2)
    assert [online_rampup(config, 1, 1.0), online_rampup(config, 2, 1.0)] == pytest.approx([math.exp(-1.25), 1.0])
