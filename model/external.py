"""Networks of other projects: of torchvision, of timm, or built by a function in a Python file."""

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from model.convert import cheapen, other_convs, replaceable_convs
from model.split import split
from utils.errors import UserError

LIBRARIES = ("torchvision", "timm")
FROM_TENSORFLOW = ("googlenet", "inception_v3")  # torchvision's published weights are converted from there


def is_external(arch: str | None) -> bool:
    """Whether --arch names a library or a Python file rather than an architecture of this project."""
    return arch in LIBRARIES or is_file(arch)


def is_file(arch: str | None) -> bool:
    return arch is not None and arch.endswith(".py")


def find(arch: str, name: str) -> Callable[..., nn.Module]:
    """The function of `arch` that builds the network `name`.

    Raises:
        UserError (a ValueError): unknown arch or name, a library that is not installed.
    """
    if is_file(arch):
        module = _load_file(Path(arch).resolve())
        if not callable(getattr(module, name, None)):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
            raise UserError(f"{arch} defines no function '{name}': it has {', '.join(own) or 'none'}")
        return getattr(module, name)
    try:
        library = importlib.import_module("torchvision.models" if arch == "torchvision" else arch)
    except ImportError as error:
        raise UserError(
            f"--arch {arch} needs the package {arch}, which is not installed: pip install {arch}"
        ) from error
    known = library.list_models(module=library) if arch == "torchvision" else library.list_models()
    if name.split(".")[0] not in known:  # in timm's names, a tag of pretrained weights may follow a dot
        close = ", ".join(difflib.get_close_matches(name, known, n=6)) or "its documentation for the names"
        raise UserError(f"{arch} has no network '{name}': try {close}")
    # Only these two have auxiliary classifiers, whose losses are no part of the objective.
    auxiliary = arch == "torchvision" and name in FROM_TENSORFLOW
    options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    return partial(library.get_model if arch == "torchvision" else library.create_model, name, **options)


def standard(arch: str, name: str, num_classes: int) -> nn.Module:
    """The network `name` of `arch`, untrained; raises as `find`, or if that is no nn.Module."""
    function = find(arch, name)
    takes_classes = not is_file(arch) or "num_classes" in inspect.signature(function).parameters
    network = function(num_classes=num_classes) if takes_classes else function()
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} of {arch} returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def build(
    arch: str, name: str, num_classes: int, cheap: dict[str, Any] | None, input_size: Sequence[int] | None = None
) -> nn.Module:
    """The network of `standard`, or a student.

    Args:
        cheap: arguments of `model.convert.cheapen`, for a student; None for a standard network.
        input_size: (C, H, W) of its images. If given, students and networks of Python files get timm's protocol where
            that is possible. In channels_last, a head that flattens its feature map with `view` fails otherwise.

    Raises:
        UserError (a ValueError): as `standard` and `cheapen`; nothing to replace.
    """
    network = standard(arch, name, num_classes)
    if cheap:
        if not replaceable_convs(network):
            others = f" ({kinds} stay as they are)" if (kinds := other_convs(network)) else ""
            message = f"{name} of {arch} has no standard convolution to make cheap but the first{others}"
            raise UserError(f"{message}: choose another one")
        cheapen(network, **cheap)
    if input_size and (cheap or is_file(arch)):
        with suppress(UserError):  # only an online teacher needs the feature map
            split(network, input_size)
    return network


@cache
def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"--arch {path} does not exist: name a Python file, or an architecture")
    sys.path.append(str(path.parent))  # for what it imports from beside itself
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
