"""Cheap convolutions that are fitted to the outputs of the standard ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import data
import model
from model.conv import KINDS
from model.convert import cheapen, inherit
from model.reconstruct import reconstruct
from tests.test_inherit import Plain


def least_error(x, y, filters):
    """Least squared error of a cheap convolution for patches x (n, I k k) and outputs y (n, O).

    Alternating least squares on the samples, from `filters` (groups, n, n k k) on.
    """
    groups, n, size = filters.shape
    inputs = x.reshape(len(x), groups, size)
    for _ in range(300):
        between = np.einsum("bgq,gmq->bgm", inputs, filters).reshape(len(x), -1)
        mixing = np.linalg.lstsq(between, y, rcond=None)[0]
        design = np.einsum("bgq,gmo->bogmq", inputs, mixing.reshape(groups, n, -1)).reshape(y.size, -1)
        filters = np.linalg.lstsq(design, y.reshape(-1), rcond=None)[0].reshape(filters.shape)
    return ((design @ filters.reshape(-1) - y.reshape(-1)) ** 2).sum()


@pytest.mark.parametrize(("kind", "n"), [("depthwise", 1), ("group", 2)])
def test_a_convolution_is_fitted_with_the_least_error(kind, n):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1, bias=False)).requires_grad_(False)
    student, images = copy.deepcopy(teacher), torch.randn(3, 3, 6, 6)
    images[:, 1] = images[:, 0]  # correlated inputs, for which the nearest weights are not the best
    cheapen(student, kind, groups=2)
    inherit(student, teacher)
    before = (student(images) - teacher(images)).square().sum().item()
    filters = student[1].spatial.weight.detach().double().reshape(4 // n, n, -1).numpy()
    reconstruct(student, teacher, [images])
    after = (student(images) - teacher(images)).square().sum().item()
    patches = nn.functional.unfold(teacher[0](images), 3, padding=1).transpose(1, 2).reshape(-1, 36)
    outputs = teacher(images).permute(0, 2, 3, 1).reshape(-1, 5)
    least = least_error(patches.double().numpy(), outputs.double().numpy(), filters)
    assert after < 0.8 * before
    assert after == pytest.approx(least, rel=0.15)


class Once(Plain):
    def forward(self, x):
        return self.fc(self.wide(self.layers(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_convolutions_come_nearer_to_the_teacher(kind):
    """Strides, biases, dilation and kernels of 3 x 5."""
    torch.manual_seed(0)
    teacher, images = Once(), torch.randn(24, 3, 12, 12)
    teacher.layers[1].momentum = 1
    teacher(images)
    student = copy.deepcopy(teacher)
    cheapen(student, kind)
    inherit(student, teacher)
    teacher.eval(), student.eval()
    before = (student(images) - teacher(images)).square().mean()
    reconstruct(student, teacher, images.split(8))
    assert (student(images) - teacher(images)).square().mean() < 0.1 * before
    assert not student.training


def test_a_convolution_that_is_used_twice_is_fitted_for_both():
    torch.manual_seed(0)
    teacher, images = Plain(), torch.randn(24, 3, 12, 12)
    teacher.layers[1].momentum = 1
    teacher(images)
    student = copy.deepcopy(teacher)
    cheapen(student, "group", groups=4)
    inherit(student, teacher)
    teacher.eval(), student.eval()
    before = (student(images) - teacher(images)).square().mean()
    reconstruct(student, teacher, images.split(8))
    assert (student(images) - teacher(images)).square().mean() < 0.5 * before


def test_statistics_of_batchnorm_are_those_of_the_images():
    torch.manual_seed(0)
    teacher, images = model.build("resnet_20"), torch.randn(32, 3, 8, 8)
    teacher(3 * images)  # statistics of other images, which the student inherits
    student = model.build("resnet_20_sparse").eval()
    inherit(student, teacher)
    own = copy.deepcopy(student).train()
    assert (student(images) - own(images)).abs().max() > 1
    reconstruct(student, teacher, [images])
    found = student(images)
    assert student.layer3[2].bn2.momentum == 0.1
    torch.testing.assert_close(found, student.train()(images), rtol=0, atol=0.1)


def test_the_sample_of_training_images_is_stratified_and_not_augmented():
    dataset = data.load("digits", None, 100)
    batches = data.sample(dataset, torch.device("cpu"), 1, count=300)
    assert [len(images) for images in batches] == [100, 100, 100]
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    pixels = (torch.cat(batches) * std + mean).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    known = {image.tobytes(): label for image, label in zip(dataset.train.images, dataset.train.targets, strict=True)}
    labels = [known[image.numpy().tobytes()] for image in pixels]
    assert np.bincount(labels).min() >= 28
