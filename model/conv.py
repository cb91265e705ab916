"""The cheap convolutions of the paper (arXiv 1909.13063, section 3): depthwise, group and shift.

A cheap convolution is a k x k *spatial* stage that keeps the channels (and is cheap, or free) followed by a 1 x 1
*pointwise* stage that mixes them. Networks get their convolutions from a plan (`cheap_convs`).
"""

from collections.abc import Callable, Container
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from model.shift import Padding, Pair, Shift2d, frozen_conv, pad_same, same_padding
from model.subsample import subsample_first
from utils.errors import UserError

_WINDOW = attrgetter("kernel_size", "stride", "padding", "dilation", "padding_mode")
_PLAIN_WINDOW = (3, 3), (1, 1), (1, 1), (1, 1), "zeros"  # of the spatial stage of a default cheap convolution

KINDS = ("depthwise", "group", "shift")

Conv = Callable[..., nn.Module]  # (in_channels, out_channels, kernel_size=3, stride=1) -> convolution without bias
ConvPlan = Callable[[int], list[Conv]]  # number of replaceable convolutions -> one factory each, in forward order


class Network(nn.Module):
    """timm's protocol for networks that define `forward_features` and `num_features`; `last` names their classifier.

    (B, 3, H, W) -> (B, num_classes) logits.
    """

    last = "fc"

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, num_features, H, W) -> (B, num_classes) logits."""
        return self.get_submodule(self.last)(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CheapConv2d(nn.Module):
    """A k x k convolution in two cheap stages: `.spatial` (in -> in, k x k), then `.pointwise` (in -> out, 1 x 1).

    The stride and the bias, if any, sit on the pointwise stage. (B, in, H, W) -> (B, out, H', W'), where H' and W' are
    those of nn.Conv2d with the same arguments, by default ceil(H / stride) and ceil(W / stride). For code that reads
    them, it has nn.Conv2d's attributes in_channels, out_channels, kernel_size, stride, padding and dilation.

    Args:
        kind: "depthwise" (one k x k filter a channel), "group" (`groups` groups) or "shift" (no weights).
        groups: of the spatial stage, for "group" alone.
        padding: k // 2 by default. "same" with a stride, which nn.Conv2d refuses, pads as TensorFlow (`pad_same`).

    Raises:
        UserError (a ValueError): an unknown kind, `groups` that does not divide in_channels, an even kernel without a
            padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        kind: str = "depthwise",
        groups: int = 4,
        *,
        padding: Padding | None = None,
        dilation: int | Pair = 1,
        padding_mode: str = "zeros",
        bias: bool = False,
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"unknown convolution '{kind}': choose from {', '.join(KINDS)}")
        if kind == "group" and (groups < 1 or in_channels % groups):
            raise UserError(
                f"groups = {groups} does not divide the {in_channels} channels of a convolution: use a divisor"
            )
        if padding is None:
            padding = same_padding(kernel_size, dilation)
        self.pads_same = padding == "same" and _pair(stride) != (1, 1)
        window = {"padding": 0 if self.pads_same else padding, "dilation": dilation, "padding_mode": padding_mode}
        if kind == "shift":
            self.spatial = Shift2d(in_channels, kernel_size, **window)
        else:
            groups = groups if kind == "group" else in_channels
            self.spatial = nn.Conv2d(in_channels, in_channels, kernel_size, groups=groups, bias=False, **window)
        self.pointwise = subsample_first(nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias))
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, self.pointwise.stride
        self.kernel_size, self.padding, self.dilation = attrgetter("kernel_size", "padding", "dilation")(self.spatial)

    def forward(self, x: Tensor) -> Tensor:
        if self.pads_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return self.pointwise(self.spatial(x))

    @property
    def is_plain(self) -> bool:
        """Whether it is 3 x 3 with padding 1, one stride for both axes and no bias, as by default."""
        spatial, pointwise = self._modules["spatial"], self._modules["pointwise"]  # faster than as attributes
        rows, columns = pointwise.stride
        square = rows == columns and pointwise.padding == (0, 0) and _WINDOW(spatial) == _PLAIN_WINDOW
        return square and _lacks_bias(pointwise) and _lacks_bias(spatial)

    @property
    def standard_shape(self) -> tuple[int, ...]:
        """Shape of the weight of the standard convolution that this one replaces, (out, in, k, k)."""
        return (*self.pointwise.weight.shape[:2], *self.spatial.kernel_size)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> float:
        """Take the weights whose product is nearest, in the Frobenius norm, to a standard weight (out, in, k, k).

        For the n input channels of one group, the standard weight is a matrix (out, n k^2), and this convolution
        expresses the matrices of rank n or less: the nearest is the truncated singular value decomposition. A shift
        expresses one tap a channel.

        Returns:
            The squared distance to the standard weight.
        """
        weight = weight.detach().double().cpu()
        out_channels, in_channels = weight.shape[:2]
        if isinstance(self.spatial, Shift2d):
            columns = torch.einsum("oikl,ikl->oi", weight, self.spatial.weight.squeeze(1).double())
            self.pointwise.weight.copy_(columns[..., None, None])
            return (weight.square().sum() - columns.square().sum()).item()
        groups, n = self.spatial.groups, in_channels // self.spatial.groups
        matrices = weight.reshape(out_channels, groups, -1).transpose(0, 1)
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        rank = min(n, s.shape[1])  # kernels beyond it keep their weights, for the gradient to find
        root = s[:, :rank].sqrt()
        kernels = self.spatial.weight.view(groups, n, -1)
        kernels[:, :rank] = (root[..., None] * v[:, :rank]).to(kernels)
        columns = weight.new_zeros(groups, out_channels, n)
        columns[..., :rank] = u[..., :rank] * root[:, None]
        self.pointwise.weight.copy_(columns.transpose(0, 1).reshape(self.pointwise.weight.shape))
        return s[:, rank:].square().sum().item()

    def dense_weight(self) -> Tensor:
        """The weight (out, in, k, k) of the one convolution that both stages amount to; not for a shift."""
        spatial, groups = self.spatial.weight.float(), self.spatial.groups
        mixing = self.pointwise.weight.reshape(len(self.pointwise.weight), groups, -1)
        with torch.autocast(spatial.device.type, enabled=False):
            dense = torch.einsum("ogm,gmi->ogi", mixing, spatial.reshape(groups, mixing.shape[2], -1))
        return dense.reshape(self.standard_shape)

    def as_convs(self, wide: int) -> nn.Module:
        """A plain one as the standard convolutions, with frozen weights, that runtimes compute fastest.

        The spatial stage has the stride, and so computes no pixels that the pointwise stage skips. Groups of fewer than
        `wide` channels are merged; if that takes all channels, both stages become one dense convolution. A shift is a
        depthwise convolution.
        """
        filters, groups = self.spatial.weight.detach(), self.spatial.groups
        channels, group, *kernel = filters.shape
        if 1 < group < wide:
            merged = next((n for n in range(1, groups) if groups % n == 0 and n * group >= wide), groups)
            if merged == groups:
                return frozen_conv(self.dense_weight(), stride=self.stride, padding=1)
            groups //= merged
            narrow = filters.reshape(groups, merged, group, group, *kernel)
            blocks = torch.einsum("gmoiyx,mn->gmoniyx", narrow, torch.eye(merged))  # each sees its own channels alone
            filters = blocks.reshape(channels, -1, *kernel)
        spatial = frozen_conv(filters.clone(), stride=self.stride, padding=1, groups=groups)
        return nn.Sequential(spatial, frozen_conv(self.pointwise.weight))


def _lacks_bias(conv: nn.Conv2d) -> bool:
    return conv._parameters.get("bias", conv) is None  # `conv.bias` is slow where it is None


def standard_conv(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Conv2d:
    """The convolution that the cheap ones replace: k x k, padding k // 2, no bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def cheap_convs(
    count: int, kind: str, groups: int, pruned_num: int | None, chosen: Container[int] | None = None
) -> list[Conv]:
    """The plan of a network: the last `pruned_num` of its `count` replaceable convolutions are cheap.

    Args:
        pruned_num: 0 for a standard network, None for all.
        chosen: the numbers of those that are cheap, instead of pruned_num.

    Raises:
        UserError (a ValueError): pruned_num outside 0 .. count.
    """
    if chosen is None:
        chosen = range(count - number_to_prune(count, pruned_num), count)
    cheap = partial(CheapConv2d, kind=kind, groups=groups)
    return [cheap if number in chosen else standard_conv for number in range(count)]


def number_to_prune(count: int, pruned_num: int | None) -> int:
    """The number of `count` replaceable convolutions to replace; raises as `cheap_convs` does."""
    if pruned_num is not None and not 0 <= pruned_num <= count:
        raise UserError(f"pruned_num = {pruned_num} is out of range: this network has {count} replaceable convolutions")
    return count if pruned_num is None else pruned_num


def cheap_in(network: nn.Module) -> dict[str, CheapConv2d]:
    """The cheap convolutions of a network by name, in the order of its modules."""
    return {name: module for name, module in network.named_modules() if isinstance(module, CheapConv2d)}


def count_cheap(network: nn.Module) -> int:
    """How many of a network's standard convolutions have been replaced by cheap ones: its pruned_num."""
    return len(cheap_in(network))


def initialize(network: nn.Module) -> None:
    """Kaiming normal for convolutions (He et al., arXiv 1502.01852), BatchNorm at weight 1 and bias 0.

    Over the fan in: PyTorch's fan out does not know about groups and would make a depthwise filter far too small.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
