"""A training loop that is not this project's, with the functions that model/README.md promises to keep."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

import data
from data.loader import Batches
from experiment import own_loop
from model.convert import cheapen
from model.online import OnlineTeacher
from utils.errors import UserError


def batches(split, dataset):
    return Batches(split, 50, dataset.mean, dataset.std, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits():
    dataset = data.load("digits", None, 100, train_size=300)
    return batches(dataset.train, dataset), batches(dataset.val, dataset)


def accuracy(network, loader):
    with torch.no_grad():
        return torch.cat([network.eval()(images).argmax(1) == targets for images, targets in loader]).float().mean()


def trained(network, loader):
    """`network` after five epochs of plain training."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        for images, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network.train()(images), targets).backward()
            optimizer.step()
    return network


def test_a_loop_of_ones_own_saves_the_best_student_of_a_torchvision_network(digits, tmp_path):
    torch.manual_seed(0)
    train, val = digits
    network = trained(models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), train)
    before = copy.deepcopy(network.state_dict())
    best = own_loop.train(network, 10, train, val, tmp_path / "best.pth", epochs=3)
    assert best > 0.4
    student = copy.deepcopy(network)
    assert cheapen(student) == 8
    student.load_state_dict(torch.load(tmp_path / "best.pth", weights_only=True))
    assert accuracy(student, val).item() == pytest.approx(best)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_an_online_teacher_splits_students_that_do_not_follow_the_protocol():
    torch.manual_seed(0)
    network = models.squeezenet1_1(num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    expected = network.eval()(images)
    learner = OnlineTeacher([network, copy.deepcopy(network)], 10).eval()
    logits, teacher_logits = learner(images)
    torch.testing.assert_close(logits, torch.stack([expected, expected]))
    assert teacher_logits.shape == (2, 10)
    assert learner.fc.in_features == 2 * network.num_features


def test_a_network_without_a_feature_map_is_no_student():
    with pytest.raises(UserError, match="forward_features"):
        OnlineTeacher([nn.Sequential(nn.Flatten(), nn.Linear(192, 10))], 10, input_size=(3, 8, 8))
