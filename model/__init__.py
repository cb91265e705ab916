"""Networks by name: `NAME` is the standard one, `NAME_sparse` the same architecture with cheap convolutions.

To add an architecture, add a file to this folder with `NETWORKS = {name: builder}`. A builder takes
`(num_classes, convs)`, where `convs(n)` gives the factories of its n replaceable convolutions in forward order, and
returns a `Network` (model/conv.py) with its modules in this order. The file may also define `variant_for`, as below,
for networks whose form depends on the size of the images. Networks of torchvision, timm and Python files
(model/external.py) are named the same way.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from model import external
from model.conv import cheap_convs, cheap_in, initialize
from model.convert import RULE, checked
from model.subsample import subsample_first
from utils.errors import UserError

SPARSE = "_sparse"

_MODULES = {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}
ARCHITECTURES = {name: module for name, module in _MODULES.items() if hasattr(module, "NETWORKS")}
_BUILDERS = {name: builder for module in ARCHITECTURES.values() for name, builder in module.NETWORKS.items()}


def names() -> list[str]:
    """Every name that `build` takes for this project's own networks."""
    return sorted(name + suffix for name in _BUILDERS for suffix in ("", SPARSE))


def architecture_of(name: str, arch: str | None = None) -> str:
    """The architecture that has the network `name`: an external `arch` itself, else a file of this folder.

    Raises:
        UserError (a ValueError): none has.
    """
    if external.is_external(arch):
        return arch
    if arch:
        _check_name(arch, [*ARCHITECTURES, *external.LIBRARIES], "architecture")
    _check_name(name, names(), "network")
    return next(arch for arch, module in ARCHITECTURES.items() if name.removesuffix(SPARSE) in module.NETWORKS)


def check_architecture(arch: str, name: str) -> None:
    """Raise a UserError unless `name` is a network of the architecture `arch`."""
    if external.is_external(arch):
        external.find(arch, name.removesuffix(SPARSE))
    elif architecture_of(name, arch) != arch:
        raise UserError(f"{name} is not a network of --arch {arch}: {', '.join(ARCHITECTURES[arch].NETWORKS)}")


def check_teacher(arch: str, name: str) -> None:
    """Raise a UserError unless `name` is a standard network: of `arch` if that is external, else of any file here."""
    check_architecture(architecture_of(name, arch), name)
    if is_sparse(name):
        raise UserError(f"--teacher_model {name} is a student: the teacher is the standard network")


def variant_for(arch: str, name: str, input_size: Sequence[int]) -> dict[str, Any]:
    """The keyword arguments of `build` with which the network suits images of `input_size` (C, H, W)."""
    if external.is_external(arch):
        return {"input_size": list(input_size)}
    module = ARCHITECTURES[architecture_of(name)]
    return module.variant_for(name.removesuffix(SPARSE), input_size) if hasattr(module, "variant_for") else {}


def _check_name(name: str, known: list[str], what: str) -> None:
    if name not in known:
        raise UserError(f"unknown {what} '{name}': try {', '.join(difflib.get_close_matches(name, known) or known)}")


def build(
    name: str,
    num_classes: int = 10,
    conv: str = "depthwise",
    groups: int = 4,
    pruned_num: int | None = None,
    arch: str | None = None,
    rule: int = RULE,
    replaced: Sequence[str] | None = None,
    **kwargs,
) -> nn.Module:
    """A freshly initialized network.

    Args:
        name: as in `resnet_56` (standard; conv, groups and pruned_num do not apply) or `resnet_56_sparse`.
        conv, groups: of the cheap convolutions, as the kind and groups of `CheapConv2d`.
        pruned_num: how many convolutions are cheap, counted from the output side; None for all.
        replaced: names of the convolutions that are cheap, instead of pruned_num.
        rule: of the convolutions that pruned_num counts in the networks of `arch`, as in `model.convert.cheapen`.
        arch: "torchvision", "timm" or a Python file that has the network; otherwise its name is one of `names()`.
        kwargs: of the architecture, as `variant_for` gives them: `stem` and `shortcut` of ResNets, `classifier` and
            `hidden` of VGGs, `input_size` of the networks that `arch` names.

    Raises:
        UserError (a ValueError): an unknown name (the close ones are listed), conv, groups or pruned_num out of range.
    """
    standard = name.removesuffix(SPARSE)
    if external.is_external(arch):
        cheap = {"kind": conv, "groups": groups, "pruned_num": pruned_num, "rule": rule, "names": replaced}
        network = external.build(arch, standard, num_classes, cheap if is_sparse(name) else None, **kwargs)
    else:
        _check_name(name, names(), "network")
        plan = partial(cheap_convs, kind=conv, groups=groups, pruned_num=pruned_num if is_sparse(name) else 0)
        if is_sparse(name) and replaced is not None:
            plan = partial(plan, chosen=_numbers(standard, replaced, kwargs))
        network = _BUILDERS[standard](num_classes=num_classes, convs=plan, **kwargs)
        initialize(network)
    subsample_first(network)
    # For students that start from its weights, and for its file.
    network.variant = kwargs if replaced is None else kwargs | {"replaced": list(replaced)}
    return network


def _numbers(name: str, replaced: Sequence[str], kwargs: dict[str, Any]) -> set[int]:
    """The places, in the plan of the network `name`, of the convolutions with these names."""
    plan = partial(cheap_convs, kind="shift", groups=1, pruned_num=None)
    with torch.device("meta"):
        known = list(cheap_in(_BUILDERS[name](num_classes=1, convs=plan, **kwargs)))
    return {known.index(path) for path in checked(replaced, known)}


def is_sparse(name: str) -> bool:
    return name.endswith(SPARSE)
