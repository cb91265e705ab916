"""VGG-16 and VGG-19 with BatchNorm (Simonyan and Zisserman, arXiv 1409.1556, table 1, D and E) as used on CIFAR."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from model.conv import ConvPlan, Network, standard_conv
from model.fused import FusedSequential, with_norm_relu
from utils.errors import UserError

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {"vgg_16_bn": (2, 2, 3, 3, 3), "vgg_19_bn": (2, 2, 4, 4, 4)}
CLASSIFIERS = ("linear", "mlp", "norm")


class VGG(Network):
    """Five stages of 3 x 3 convolutions, each with BatchNorm and ReLU, a max pool after every stage.

    Args:
        depths: convolutions a stage.
        convs: plan of the convolutions but the first, which sees the image.
        classifier: "linear", one Linear layer; "mlp", two hidden layers with dropout before it; "norm", one with
            BatchNorm, and an average over what the last max pool would have seen (GAL, arXiv 1903.09291).
        hidden: units of the hidden layers.
    """

    num_features, last = WIDTHS[-1], "classifier"

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        convs: ConvPlan,
        classifier: str = "linear",
        hidden: int = 512,
    ):
        super().__init__()
        if classifier not in CLASSIFIERS:
            raise UserError(f"unknown classifier '{classifier}': choose from {', '.join(CLASSIFIERS)}")
        plan = iter([standard_conv, *convs(sum(depths) - 1)])
        layers, in_channels = [], 3
        for depth, channels in zip(depths, WIDTHS, strict=True):
            for _ in range(depth):
                layers += with_norm_relu(next(plan)(in_channels, channels))
                in_channels = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # a single pixel stays one: images of any size will do
        self.features = FusedSequential(*(layers[:-1] if classifier == "norm" else layers))
        self.classifier = _classifier(classifier, self.num_features, hidden, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last feature map, (B, num_features, ceil(H / 32), ceil(W / 32)); of 16ths for "norm"."""
        return self.features(x)


def _classifier(kind: str, in_features: int, hidden: int, num_classes: int) -> nn.Module:
    last = nn.Linear(in_features if kind == "linear" else hidden, num_classes)
    if kind == "mlp":
        first = nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout()
        return nn.Sequential(*first, nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), last)
    if kind == "norm":
        first = {"linear1": nn.Linear(in_features, hidden), "norm1": nn.BatchNorm1d(hidden), "relu1": nn.ReLU()}
        return nn.Sequential(OrderedDict(first, linear2=last))
    return last


NETWORKS = {name: partial(VGG, depths) for name, depths in DEPTHS.items()}
