"""GoogLeNet (Szegedy et al., arXiv 1409.4842, table 1) as used on CIFAR: 3 x 3 stem, BatchNorm, one head."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.conv import Conv, ConvPlan, Network, standard_conv
from model.fused import FusedSequential, with_norm_relu

# Channels of each inception: 1 x 1; reduction and 3 x 3; reduction and the pair of 3 x 3; projection after the pool.
INCEPTIONS = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}


class Inception(nn.Module):
    """Four branches side by side; two 3 x 3 convolutions stand for the 5 x 5 one (arXiv 1512.00567, section 3.1).

    (B, in_channels, H, W) -> (B, out_channels, H, W).

    Args:
        channels: a row of INCEPTIONS.
        plan: of the three 3 x 3 convolutions, which are taken from it.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], plan: Iterator[Conv]):
        super().__init__()
        one, reduce3, three, reduce5, five, pool = channels
        self.out_channels = one + three + five + pool
        self.b1 = FusedSequential(*with_norm_relu(standard_conv(in_channels, one, 1)))
        self.b2 = FusedSequential(*with_norm_relu(standard_conv(in_channels, reduce3, 1), next(plan)(reduce3, three)))
        convs = standard_conv(in_channels, reduce5, 1), next(plan)(reduce5, five), next(plan)(five, five)
        self.b3 = FusedSequential(*with_norm_relu(*convs))
        pooling = nn.MaxPool2d(3, stride=1, padding=1)
        self.b4 = FusedSequential(pooling, *with_norm_relu(standard_conv(in_channels, pool, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], dim=1)


class GoogLeNet(Network):
    """GoogLeNet for small images. (B, 3, H, W) -> (B, num_classes) logits.

    Args:
        convs: plan of the 3 x 3 convolutions of the inceptions.
    """

    last = "linear"

    def __init__(self, num_classes: int, convs: ConvPlan):
        super().__init__()
        plan = iter(convs(3 * len(INCEPTIONS)))
        self.pre_layers = FusedSequential(*with_norm_relu(standard_conv(3, 192)))
        self.num_features = 192
        for name, channels in INCEPTIONS.items():
            self.add_module(name, Inception(self.num_features, channels, plan))
            self.num_features = self.get_submodule(name).out_channels
        self.linear = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last feature map, (B, num_features, ceil(H / 4), ceil(W / 4))."""
        x = self.pre_layers(x)
        for name in INCEPTIONS:
            if name in ("a4", "a5"):  # the first of a stage
                x = F.max_pool2d(x, 3, stride=2, padding=1)
            x = self.get_submodule(name)(x)
        return x


NETWORKS = {"googlenet": GoogLeNet}
