"""The benchmarks' baselines do the same work as what they are compared with, only slower."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from experiment import loading
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


def test_the_pipelines_of_the_streaming_benchmark_make_the_same_batches(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            image = Image.fromarray(pixels).resize((300, 280), Image.Resampling.BICUBIC)
            image.save(tmp_path / split / name / "a.jpg", quality=95)
    dataset, repeated = data.load("folder", tmp_path, 0, image_size=224), np.array([0, 1, 0])
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)])
    others = [
        partial(other, tmp_path / "train", repeated, normalize) for other in (loading.references, loading.tensors)
    ]
    for training in (True, False):
        ((images, targets),) = loading.ours(dataset, repeated, training)
        assert sorted(targets.tolist()) == [0, 0, 1]
        for other in others:
            ((expected, expected_targets),) = other(training)
            assert (images.shape, images.dtype) == (expected.shape, expected.dtype)
            if not training:
                assert torch.equal(targets, expected_targets)
                assert (images - expected).abs().max() < 1.01 / 255 / 0.224
