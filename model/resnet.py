"""ResNets (He et al., arXiv 1512.03385): the 6n + 2 layers of section 4.2 for CIFAR, and ResNet-18, 34 and 50."""

from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch.nn.functional as F
from torch import Tensor, nn

from model.conv import Conv, ConvPlan, Network, standard_conv
from model.fused import conv_norm_relu, conv_norm_relu_and_input
from utils.errors import UserError

STEMS = ("cifar", "imagenet")


class PaddingShortcut(nn.Module):
    """Option A, without parameters: every `stride`-th pixel, the new channels zero, half of them on each side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        new = out_channels - in_channels
        self.padding = (0, 0, 0, 0, new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class ProjectionShortcut(nn.Sequential):
    """Option B: a 1 x 1 convolution and BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(standard_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


SHORTCUTS = {"A": PaddingShortcut, "B": ProjectionShortcut}


class StandardBlock(nn.Module):
    """conv - BN - ReLU - conv - BN, plus the shortcut, then ReLU. The stride sits on the first convolution."""

    replaceable, expansion, strided = 2, 1, "conv1"

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: nn.Module, conv1: Conv, conv2: Conv):
        super().__init__()
        strides = {"conv1": 1, "conv2": 1, self.strided: stride}
        self.conv1 = conv1(in_channels, channels, stride=strides["conv1"])
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv2(channels, channels, stride=strides["conv2"])
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm_relu(self.conv1, self.bn1, x)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class StudentBlock(StandardBlock):
    """conv - BN - ReLU - conv - BN - ReLU, plus the shortcut, and no ReLU after. The stride sits on the second."""

    strided = "conv2"

    def forward(self, x: Tensor) -> Tensor:
        out, x = conv_norm_relu_and_input(self.conv1, self.bn1, x)
        return conv_norm_relu(self.conv2, self.bn2, out, residual=self.shortcut(x))


class BottleneckBlock(nn.Module):
    """1 x 1 conv - BN - ReLU - 3 x 3 conv - BN - ReLU - 1 x 1 conv - BN, plus the shortcut, then ReLU.

    The stride sits on the 3 x 3 convolution; the last one widens the block fourfold.
    """

    replaceable, expansion = 1, 4

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: nn.Module, conv2: Conv):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = standard_conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv2(channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = standard_conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm_relu(self.conv1, self.bn1, x)
        out = conv_norm_relu(self.conv2, self.bn2, out)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(Network):
    """A stem and stages of residual blocks, each half as large and twice as wide. (B, 3, H, W) -> (B, num_classes).

    Args:
        blocks: how many a stage has.
        width: channels of the stem, and of the convolutions of the first stage.
        block: class of the blocks.
        cheap_block: class of those that hold a cheap convolution.
        convs: plan of the 3 x 3 convolutions of all blocks.
        stem: "cifar", one 3 x 3 convolution, or "imagenet", a 7 x 7 one of stride 2 and a max pool.
        shortcut: where the shape changes, "B" projects, "A" subsamples and pads with zeros.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        block: type[nn.Module],
        cheap_block: type[nn.Module],
        num_classes: int,
        convs: ConvPlan,
        stem: str = "cifar",
        shortcut: str = "B",
    ):
        super().__init__()
        if stem not in STEMS:
            raise UserError(f"unknown stem '{stem}': choose from {', '.join(STEMS)}")
        if shortcut not in SHORTCUTS:
            raise UserError(f"unknown shortcut '{shortcut}': choose from {', '.join(SHORTCUTS)}")
        large = stem == "imagenet"
        self.conv1 = standard_conv(3, width, kernel_size=7, stride=2) if large else standard_conv(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        self.num_features = width
        plan = iter(convs(block.replaceable * sum(blocks)))
        for i, name in enumerate(self.stages):
            stage = nn.Sequential()
            for j in range(blocks[i]):
                factories = list(islice(plan, block.replaceable))
                form = block if all(conv is standard_conv for conv in factories) else cheap_block
                channels, stride = width * 2**i, 2 if i > 0 and j == 0 else 1
                shape = self.num_features, channels * form.expansion, stride
                reshapes = stride > 1 or shape[0] != shape[1]
                skip = SHORTCUTS[shortcut](*shape) if reshapes else nn.Sequential()
                stage.append(form(self.num_features, channels, stride, skip, *factories))
                self.num_features = channels * form.expansion
            self.add_module(name, stage)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last feature map, (B, num_features, H', W').

        A 4th as high and wide in CIFAR ResNets, in the others an 8th, or with the stem "imagenet" a 32nd, rounded up.
        """
        x = self.pool(conv_norm_relu(self.conv1, self.bn1, x))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x


# The student's own form of a block is that of arXiv 1909.13063, for these networks.
CIFAR = {
    f"resnet_{depth}": partial(ResNet, [(depth - 2) // 6] * 3, 16, StandardBlock, StudentBlock)
    for depth in (20, 32, 44, 56, 110)
}
IMAGENET = {
    f"resnet_{depth}": partial(ResNet, blocks, 64, block, block, stem="imagenet")
    for depth, blocks, block in (
        (18, (2, 2, 2, 2), StandardBlock),
        (34, (3, 4, 6, 3), StandardBlock),
        (50, (3, 4, 6, 3), BottleneckBlock),
    )
}
NETWORKS = CIFAR | IMAGENET


def variant_for(name: str, input_size: tuple[int, int, int]) -> dict[str, str]:
    """The keywords of `build` that suit the network `name` to images of `input_size` (C, H, W)."""
    if name not in IMAGENET:
        return {}
    return {"stem": "cifar" if min(input_size[1:]) < 64 else "imagenet"}
