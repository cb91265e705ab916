"""Replacing the standard convolutions of any network by cheap ones, and starting those from trained weights."""

from collections import Counter
from collections.abc import Container, Sequence
from math import prod

import torch
from torch import Tensor, nn

from model.conv import CheapConv2d, cheap_in, initialize, number_to_prune
from utils.errors import UserError

RULE = 2  # of what is replaceable, which files state because pruned_num counts it; 1: timm's Conv2dSame is not
LARGE_SHARE = 0.9  # of the standard network's parameters, above which `remarks` says how many a student keeps


def cheapen(
    module: nn.Module,
    kind: str = "depthwise",
    groups: int = 4,
    pruned_num: int | None = None,
    rule: int = RULE,
    names: Sequence[str] | None = None,
) -> int:
    """Replace standard k x k convolutions of a network by cheap ones with the same output shape, in place.

    Replaces every nn.Conv2d and Conv2dSame of timm with k > 1 and groups = 1, except the first convolution, the one on
    the image. Other subclasses of nn.Conv2d stay: they compute something else. The cheap convolutions are freshly
    initialized; everything else keeps its weights.

    Args:
        kind, groups: as in CheapConv2d.
        pruned_num: how many to replace, counted from the end of `replaceable_convs`; None for all.
        rule: of what is replaceable, RULE or the one that a file states.
        names: the ones to replace, instead of pruned_num.

    Returns:
        The number of convolutions that were replaced.

    Raises:
        UserError (a ValueError): an unknown kind, groups that do not divide a convolution's channels, pruned_num out of
            range. The network is then unchanged.
    """
    convs = replaceable_convs(module, rule)
    if names is None:
        names = list(convs)[len(convs) - number_to_prune(len(convs), pruned_num) :]
    cheap = {convs[name]: _cheap(convs[name], kind, groups) for name in checked(names, convs)}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # named_children skips the second use of a module
            if child in cheap:
                setattr(parent, name, cheap[child])
    return len(cheap)


def checked(names: Sequence[str], known: Container[str]) -> Sequence[str]:
    """The names; raises a UserError if one of them is not of a convolution that can be made cheap, one of `known`."""
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"the network has no convolution '{unknown[0]}' to make cheap")
    return names


def replaceable_convs(module: nn.Module, rule: int = RULE) -> dict[str, nn.Conv2d]:
    """The convolutions that `cheapen` replaces by name, in the order of `module.modules()`."""
    return {name: conv for name, conv in _wide_convs(module).items() if _is_known(conv, rule)}


def remarks(student: nn.Module) -> list[str]:
    """Lines for the log: on convolutions of other classes, which stay, and on a student that is hardly smaller."""
    cheap = cheap_in(student).values()
    weights = sum(weight.numel() for conv in cheap for weight in conv.parameters() if weight.dim() == 4)
    params = sum(parameter.numel() for parameter in student.parameters())
    share = params / (params - weights + sum(prod(conv.standard_shape) for conv in cheap))
    lines = []
    if others := other_convs(student):
        lines.append(f"{others} stay standard: only nn.Conv2d and timm's Conv2dSame are made cheap")
    if cheap and share > LARGE_SHARE:
        lines.append(f"the student keeps {share:.1%} of the parameters: choose another network for a small one")
    return lines


def other_convs(module: nn.Module) -> str:
    """The k x k convolutions of classes that `cheapen` does not know, counted, as in "16 ScaledStdConv2d"."""
    kinds = Counter(type(conv).__name__ for conv in _wide_convs(module).values() if not _is_known(conv, RULE))
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _wide_convs(module: nn.Module) -> dict[str, nn.Conv2d]:
    """The k x k convolutions with k > 1 and groups = 1 by name, but the first, which is on the image."""
    convs = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Conv2d)]
    return {name: conv for name, conv in convs[1:] if conv.groups == 1 and conv.kernel_size != (1, 1)}


def _is_known(conv: nn.Conv2d, rule: int) -> bool:
    return type(conv) is nn.Conv2d or (rule > 1 and _pads_same(conv))


def _pads_same(conv: nn.Conv2d) -> bool:
    """Whether it is timm's Conv2dSame, which pads as TensorFlow does."""
    kind = type(conv)
    return kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")


def _cheap(conv: nn.Conv2d, kind: str, groups: int) -> CheapConv2d:
    shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
    padding = "same" if _pads_same(conv) else conv.padding
    window = {"padding": padding, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
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
    pairs = replaced(student, teacher).values()
    student.load_state_dict(_shared(student, teacher), strict=False)
    with torch.no_grad():
        for cheap, conv in pairs:
            if cheap.pointwise.bias is not None:
                cheap.pointwise.bias.copy_(conv.bias if conv.bias is not None else torch.tensor(0.0))
    lost = sum(cheap.approximate(conv.weight) for cheap, conv in pairs)
    total = sum(conv.weight.detach().double().square().sum().item() for _, conv in pairs)
    return 1 - lost / total if total else 1.0


def replaced(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[CheapConv2d, nn.Conv2d]]:
    """The cheap convolutions of a student by name, each with the teacher's convolution that it replaces.

    Raises:
        UserError: the teacher has none for one of them.
    """
    standard, pairs = dict(teacher.named_modules()), {}
    for name, cheap in cheap_in(student).items():
        conv = standard.get(name)
        fits = isinstance(conv, nn.Conv2d) and tuple(conv.weight.shape) == cheap.standard_shape
        if not fits or (conv.bias is not None and cheap.pointwise.bias is None):
            raise UserError(
                f"the student's {name} replaces a convolution with weights {cheap.standard_shape}, which the teacher "
                "does not have under this name: give the student's own standard network as the teacher"
            )
        pairs[name] = cheap, conv
    return pairs


def not_inherited(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the student's parameters and buffers that `inherit` does not change."""
    shared, cheap = _shared(student, teacher), tuple(f"{name}." for name in cheap_in(student))
    return [name for name in student.state_dict() if name not in shared and not name.startswith(cheap)]


def add_noise(network: nn.Module, strength: float) -> None:
    """Add Gaussian noise to the weight of each convolution, of `strength` times the weight's standard deviation."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.add_(torch.randn_like(module.weight), alpha=strength * module.weight.std().item())


def _shared(student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """The teacher's parameters and buffers that the student has under the same name and in the same shape."""
    own = student.state_dict()
    return {key: value for key, value in teacher.state_dict().items() if key in own and own[key].shape == value.shape}
