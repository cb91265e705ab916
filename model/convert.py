"""Any network's standard convolutions made cheap, where they stand."""

from torch import nn

from model.conv import CheapConv2d, initialize, number_to_prune


def cheapen(module: nn.Module, kind: str = "depthwise", groups: int = 4, pruned_num: int | None = None) -> int:
    """Replace standard k x k convolutions of a network by cheap ones with the same output shape, in place.

    Replaced is every nn.Conv2d (of that very type) with k > 1 and groups = 1, but for the first convolution, the one on
    the image. Stride, padding, dilation and bias go along; the new weights are freshly initialized, on the device and
    in the type of the old ones. Everything else keeps its weights.

    Args:
        kind, groups: as CheapConv2d's.
        pruned_num: how many to replace, the last ones in the order of `module.modules()`; None for all.

    Returns:
        How many were replaced.

    Raises:
        UserError (a ValueError): an unknown kind, groups that do not divide a convolution's channels, pruned_num out of
            range. The network is then as it was.
    """
    convs = replaceable_convs(module)
    convs = convs[len(convs) - number_to_prune(len(convs), pruned_num) :]
    cheap = {conv: _cheap(conv, kind, groups) for conv in convs}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # named_children would pass over a second use of a module
            if child in cheap:
                setattr(parent, name, cheap[child])
    return len(cheap)


def replaceable_convs(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that `cheapen` replaces."""
    convs = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    return [conv for conv in convs[1:] if type(conv) is nn.Conv2d and conv.groups == 1 and conv.kernel_size != (1, 1)]


def _cheap(conv: nn.Conv2d, kind: str, groups: int) -> CheapConv2d:
    cheap = CheapConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        kind,
        groups,
        padding=conv.padding,
        dilation=conv.dilation,
        padding_mode=conv.padding_mode,
        bias=conv.bias is not None,
    )
    initialize(cheap)
    return cheap.to(conv.weight).train(conv.training)
