"""Learning rates by epoch and step."""

import pytest
import torch

import model
from model.online import Students
from utils import options
from utils.engine import Trainer, cosine_rate, step_rate

CPU = torch.device("cpu")


def arguments(*flags):
    return options.parse("main", ["--dataset", "digits", *map(str, flags)])


def student():
    return Students([model.build("resnet_20_sparse")])


def test_learning_rates():
    rates = [step_rate(0.1, [150, 225], epoch) for epoch in (1, 150, 151, 225, 226, 300)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert [cosine_rate(0.1, 4, epoch) for epoch in (1, 3)] == pytest.approx([0.1, 0.05])
    assert 0 < cosine_rate(0.1, 300, 300) < 1e-5


@pytest.mark.parametrize(("epochs", "expected"), [(300, [150, 225]), (1, [1, 1]), (10, [5, 7])])
def test_default_decay_is_after_a_half_and_three_quarters(epochs, expected):
    assert arguments("--num_epochs", epochs).lr_decay_step == expected


def test_rate_rises_linearly_over_the_warm_up():
    trainer = Trainer(student(), None, arguments("--lr", 0.4, "--warmup_epochs", 1.5), CPU, "fp32")
    rates = []
    for trainer.epoch in (1, 2):
        rates += [trainer.rate(step, 4) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.4 * step / 6 for step in range(1, 7)] + [0.4, 0.4])
    trainer = Trainer(student(), None, arguments("--lr", 0.4, "--warmup_epochs", 0), CPU, "fp32")
    trainer.epoch = 1
    assert trainer.rate(1, 4) == 0.4
