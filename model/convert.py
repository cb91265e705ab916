"""Replacing the standard convolutions of any network by cheap ones, and starting those from trained weights."""

import torch
from torch import Tensor, nn

from model.conv import CheapConv2d, initialize, number_to_prune
from utils.errors import UserError


def cheapen(module: nn.Module, kind: str = "depthwise", groups: int = 4, pruned_num: int | None = None) -> int:
    """Replace standard k x k convolutions of a network by cheap ones with the same output shape, in place.

    Replaces every nn.Conv2d (no subclasses) with k > 1 and groups = 1, except the first convolution, the one on the
    image. The cheap ones are freshly initialized; everything else keeps its weights.

    Args:
        kind, groups: as in CheapConv2d.
        pruned_num: how many to replace, the last ones in the order of `module.modules()`; None for all.

    Returns:
        The number of convolutions that were replaced.

    Raises:
        UserError (a ValueError): an unknown kind, groups that do not divide a convolution's channels, pruned_num out of
            range. The network is then unchanged.
    """
    convs = replaceable_convs(module)
    convs = convs[len(convs) - number_to_prune(len(convs), pruned_num) :]
    cheap = {conv: _cheap(conv, kind, groups) for conv in convs}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # named_children skips the second use of a module
            if child in cheap:
                setattr(parent, name, cheap[child])
    return len(cheap)


def replaceable_convs(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that `cheapen` replaces."""
    convs = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    return [conv for conv in convs[1:] if type(conv) is nn.Conv2d and conv.groups == 1 and conv.kernel_size != (1, 1)]


def _cheap(conv: nn.Conv2d, kind: str, groups: int) -> CheapConv2d:
    shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
    window = {"padding": conv.padding, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
    cheap = CheapConv2d(*shape, kind, groups, bias=conv.bias is not None, **window)
    initialize(cheap)
    return cheap.to(conv.weight).train(conv.training)


def inherit(student: nn.Module, teacher: nn.Module) -> float:
    """Start a student from the weights of its trained standard network, in place.

    Copies parameters and buffers that have the same name and shape in both. Each cheap convolution gets the weights
    nearest, in the Frobenius norm, to those of the standard convolution with its name (`CheapConv2d.approximate`). A
    k x k convolution is a sum of depthwise separable ones, and this is its leading term (Guo et al., *Network
    Decoupling*, BMVC 2018).

    Args:
        student: a network of this project or one that `cheapen` changed.
        teacher: the same network with standard convolutions.

    Returns:
        The energy kept of the replaced convolutions, 1 - ||W - W'||^2 / ||W||^2 over all of them; 1 if none was
        replaced.

    Raises:
        UserError (a ValueError): the teacher has no standard convolution for a cheap one. The student is then
            unchanged.
    """
    standard = dict(teacher.named_modules())
    pairs = [(cheap, _counterpart(name, cheap, standard)) for name, cheap in _cheap_convs(student)]
    given = teacher.state_dict()
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if _is_shared(name, value, given):
                value.copy_(given[name])
        for cheap, conv in pairs:
            if cheap.pointwise.bias is not None:
                cheap.pointwise.bias.copy_(conv.bias if conv.bias is not None else torch.tensor(0.0))
    lost = sum(cheap.approximate(conv.weight) for cheap, conv in pairs)
    total = sum(conv.weight.detach().double().square().sum().item() for _, conv in pairs)
    return 1 - lost / total if total else 1.0


def not_inherited(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the student's parameters and buffers that `inherit` does not change."""
    given, replaced = teacher.state_dict(), tuple(f"{name}." for name, _ in _cheap_convs(student))
    return [
        name
        for name, value in student.state_dict().items()
        if not (name.startswith(replaced) or _is_shared(name, value, given))
    ]


def add_noise(network: nn.Module, strength: float) -> None:
    """Add Gaussian noise to the weight of each convolution, of `strength` times the weight's standard deviation."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.add_(torch.randn_like(module.weight), alpha=strength * module.weight.std().item())


def _is_shared(name: str, value: Tensor, given: dict[str, Tensor]) -> bool:
    return name in given and given[name].shape == value.shape


def _cheap_convs(network: nn.Module) -> list[tuple[str, CheapConv2d]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, CheapConv2d)]


def _counterpart(name: str, cheap: CheapConv2d, standard: dict[str, nn.Module]) -> nn.Conv2d:
    """The standard convolution that `cheap`, called `name`, replaces."""
    conv = standard.get(name)
    fits = isinstance(conv, nn.Conv2d) and tuple(conv.weight.shape) == cheap.standard_shape
    if not fits or (conv.bias is not None and cheap.pointwise.bias is None):
        raise UserError(
            f"the student's {name} replaces a convolution with weights {cheap.standard_shape}, which the teacher does "
            "not have under this name: give the student's own standard network as the teacher"
        )
    return conv
