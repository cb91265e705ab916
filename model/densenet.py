"""DenseNet-40 for CIFAR (Huang et al., arXiv 1608.06993, section 3): growth rate 12, no bottlenecks, no compression."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.conv import ConvPlan, Network, standard_conv
from model.fused import norm_relu

GROWTH = 12


class DenseLayer(nn.Module):
    """BN - ReLU - conv, and its output behind its input. (B, C, H, W) -> (B, C + GROWTH, H, W)."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(conv.in_channels)
        self.conv1 = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(norm_relu(self.bn1, x))], dim=1)


class Transition(DenseLayer):
    """BN - ReLU - conv - average pool. (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(norm_relu(self.bn1, x)), 2, ceil_mode=True)


class DenseNet(Network):
    """DenseNet of `3 * layers + 4` layers for small images. (B, 3, H, W) -> (B, num_classes) logits.

    Args:
        layers: of each of the three dense blocks.
        convs: plan of their 3 x 3 convolutions.
    """

    def __init__(self, layers: int, num_classes: int, convs: ConvPlan):
        super().__init__()
        plan = iter(convs(3 * layers))
        self.num_features = 2 * GROWTH
        self.conv1 = standard_conv(3, self.num_features)
        for block in (1, 2, 3):
            dense = nn.Sequential()
            for _ in range(layers):
                dense.append(DenseLayer(next(plan)(self.num_features, GROWTH)))
                self.num_features += GROWTH
            self.add_module(f"dense{block}", dense)
            if block < 3:
                self.add_module(f"trans{block}", Transition(standard_conv(self.num_features, self.num_features, 1)))
        self.bn = nn.BatchNorm2d(self.num_features)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last feature map, after BN and ReLU, (B, num_features, ceil(H / 4), ceil(W / 4))."""
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return norm_relu(self.bn, x)


NETWORKS = {"densenet_40": partial(DenseNet, (40 - 4) // 3)}  # checkpoints of GAL are under these very keys
