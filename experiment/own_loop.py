"""Cheap students of a trained torchvision network, in a training loop of one's own.

    python experiment/own_loop.py resnet18 WEIGHTS.pth photos best.pth

The photographs are in photos/train/<class> and photos/val/<class>. model/README.md lists the functions of this project
that such a loop needs.
"""

import copy
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from model.convert import cheapen, inherit
from model.online import OnlineTeacher
from utils.losses import online_distillation

Batches = Iterable[tuple[Tensor, Tensor]]


def train(network: nn.Module, num_classes: int, data: Batches, val: Batches, path: str, epochs: int = 30) -> float:
    """Train four students of `network`, save the best one's weights to `path`; returns its validation accuracy."""
    students, device, best = [copy.deepcopy(network) for _ in range(4)], next(network.parameters()).device, -1.0
    for i, student in enumerate(students):
        cheapen(student, "depthwise")
        inherit(student, network)
        for weight in student.parameters() if i else ():  # noise: equal students learn nothing from one another
            if weight.dim() == 4:
                weight.data += 0.3 * weight.std() * torch.randn_like(weight)
    learner, network = OnlineTeacher(students, num_classes).to(device), network.eval()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        learner.train()
        for images, targets in ((x.to(device), y.to(device)) for x, y in data):
            student_logits, teacher_logits = learner(images)
            with torch.no_grad():
                pretrained_logits = network(images)
            losses = online_distillation(student_logits, teacher_logits, targets, 0.1, 4.0, pretrained_logits, miu=1.0)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
        scheduler.step()
        learner.eval()
        with torch.no_grad():
            right = torch.cat([learner(x.to(device))[0].argmax(2) == y.to(device) for x, y in val], dim=1)
        accuracy, index = right.float().mean(1).max(0)
        if accuracy > best:
            best = accuracy.item()
            torch.save(students[index].state_dict(), path)
    return best


if __name__ == "__main__":
    name, weights, photos, path = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    crops = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *pixels]
    data = datasets.ImageFolder(f"{photos}/train", transforms.Compose(crops))
    val = datasets.ImageFolder(
        f"{photos}/val", transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *pixels])
    )
    network = models.get_model(name, num_classes=len(data.classes))
    network.load_state_dict(torch.load(weights, weights_only=True))
    loaders = DataLoader(data, 128, shuffle=True, num_workers=4), DataLoader(val, 128, num_workers=4)
    print(f"best student: {train(network.to(device), len(data.classes), *loaders, path):.2%} on the validation images")
