"""The benchmark's baseline does the same work as what it is compared with, only slower."""

import pytest
import torch

from experiment.benchmark import Baseline, Ours, Setting, noise, work
from model import fused
from model.conv import KINDS

CPU = torch.device("cpu")


@pytest.mark.parametrize("compile", ["auto", "off"])
@pytest.mark.parametrize("conv", KINDS)
def test_a_step_of_the_baseline_changes_the_weights_as_ours_does(conv, compile):
    setting = Setting(conv, num_students=2, batch_size=4)
    baseline, ours = Baseline(setting, CPU), Ours(setting, CPU, "fp32", compile)
    torch.manual_seed(0)
    batch = noise(setting.batch_size, CPU)
    before = {name: p.detach().clone() for name, p in ours.learner.named_parameters()}
    for variant in (baseline, ours):
        variant.step(*batch)
    fused.disable()
    weights = dict(baseline.learner.named_parameters())
    changes = torch.cat([(p - before[name]).flatten() for name, p in ours.learner.named_parameters()])
    expected = torch.cat([(weights[name] - old).flatten() for name, old in before.items()])
    assert (changes - expected).norm() < 0.01 * expected.norm()  # kinks of ReLUs included


def test_work_of_a_step():
    """From the published costs of a depthwise ResNet-56 student: 20.47 M multiply-accumulates."""
    operations, elements = work(Setting("depthwise", num_students=1, batch_size=2))
    head = 64 * 10
    assert operations == pytest.approx(3 * 2 * 2 * (20.47e6 + head), rel=1e-3)
    first, second, third = 16 * 32 * 32, 32 * 16 * 16, 64 * 8 * 8  # a map of each stage
    # Stem and first stage; two later stages, whose first block starts at the size before and projects; the head.
    assert elements == 2 * (19 * first + (2 * first + 18 * second) + (2 * second + 18 * third) + third)
