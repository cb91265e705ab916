"""CIFAR ResNets (He et al., arXiv 1512.03385, section 4.2): a 3 x 3 stem and three stages of 16, 32 and 64 channels."""

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from model.conv import Conv, ConvPlan, initialize, standard_conv, standard_convs
from model.fused import conv_norm_relu, conv_norm_relu_and_input

SHORTCUTS = ("A", "B")
WIDTHS = (16, 32, 64)


class PaddingShortcut(nn.Module):
    """Option A, without parameters: every `stride`-th pixel, the new channels zero, half of them on each side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        new = out_channels - in_channels
        self.padding = (0, 0, 0, 0, new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Option B: a 1 x 1 convolution and BatchNorm."""
    return nn.Sequential(standard_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class StandardBlock(nn.Module):
    """conv - BN - ReLU - conv - BN, plus the shortcut, then ReLU. The stride sits on the first convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, conv1: Conv, conv2: Conv, shortcut: nn.Module):
        super().__init__()
        self.conv1 = conv1(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv2(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm_relu(self.conv1, self.bn1, x)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class StudentBlock(nn.Module):
    """conv - BN - ReLU - conv - BN - ReLU, plus the shortcut, and no ReLU after. The stride sits on the second."""

    def __init__(self, in_channels: int, channels: int, stride: int, conv1: Conv, conv2: Conv, shortcut: nn.Module):
        super().__init__()
        self.conv1 = conv1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv2(channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out, x = conv_norm_relu_and_input(self.conv1, self.bn1, x)
        return conv_norm_relu(self.conv2, self.bn2, out, residual=self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of `6 * blocks + 2` layers for small images. (B, 3, H, W) -> (B, num_classes) logits.

    Args:
        blocks: residual blocks a stage.
        convs: plan of the two convolutions of every block; a block with a cheap one takes the student form.
        shortcut: "B" projects where the shape changes, "A" subsamples and pads with zeros.
    """

    def __init__(self, blocks: int, num_classes: int = 10, convs: ConvPlan = standard_convs, shortcut: str = "B"):
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise ValueError(f"unknown shortcut '{shortcut}': choose from {', '.join(SHORTCUTS)}")
        self.num_features = WIDTHS[-1]
        self.conv1 = standard_conv(3, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        plan = iter(convs(2 * blocks * len(WIDTHS)))
        self.layer1 = _make_layer(WIDTHS[0], WIDTHS[0], blocks, 1, plan, shortcut)
        self.layer2 = _make_layer(WIDTHS[0], WIDTHS[1], blocks, 2, plan, shortcut)
        self.layer3 = _make_layer(WIDTHS[1], WIDTHS[2], blocks, 2, plan, shortcut)
        self.fc = nn.Linear(self.num_features, num_classes)
        initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last feature map, (B, num_features, ceil(H / 4), ceil(W / 4))."""
        x = conv_norm_relu(self.conv1, self.bn1, x)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, num_features, H, W) -> (B, num_classes) logits."""
        return self.fc(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _make_layer(
    in_channels: int, channels: int, blocks: int, stride: int, plan: Iterator[Conv], shortcut: str
) -> nn.Sequential:
    """A stage: its first block changes the shape, the others keep it."""
    first = _block(in_channels, channels, stride, next(plan), next(plan), shortcut)
    return nn.Sequential(
        first, *(_block(channels, channels, 1, next(plan), next(plan), shortcut) for _ in range(blocks - 1))
    )


def _block(in_channels: int, channels: int, stride: int, conv1: Conv, conv2: Conv, shortcut: str) -> nn.Module:
    if stride == 1 and in_channels == channels:
        skip = nn.Sequential()
    elif shortcut == "A":
        skip = PaddingShortcut(in_channels, channels, stride)
    else:
        skip = projection_shortcut(in_channels, channels, stride)
    block = StandardBlock if conv1 is conv2 is standard_conv else StudentBlock
    return block(in_channels, channels, stride, conv1, conv2, skip)


def from_public(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Public CIFAR ResNets call the classifier `linear` or `fc` and a projection `downsample` or `shortcut`."""
    names = {"linear": "fc", "downsample": "shortcut"}
    weights = {".".join(names.get(part, part) for part in key.split(".")): value for key, value in weights.items()}
    # Shortcuts without weights are those of option A.
    return weights, {"shortcut": "B" if any(".shortcut." in key for key in weights) else "A"}


NETWORKS = {f"resnet_{depth}": partial(ResNet, (depth - 2) // 6) for depth in (20, 32, 44, 56, 110)}
