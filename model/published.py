"""Checkpoints that other projects published, as networks of this project.

`PROJECTS` has one entry a project. Files are recognized by their keys and by the key under which they keep the state
dict. The keys of all projects are renamed in a file of any, so that a file that was saved again without its wrapper
loads, too; only its normalization is then unknown.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from model.external import FROM_TENSORFLOW, is_external
from model.weights import build_with, outline
from utils.errors import UserError
from utils.files import is_state_dict
from utils.normalization import NORMALIZATIONS, MeanStd

# Ends of the names of checkpoints in a folder.
SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".pth.tar", ".pt.tar", "model.bin", ".safetensors")
# Keys under which training scripts save the state dict, preferred to others.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
CONTAINERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")  # of DataParallel and torch.compile
COSTS = re.compile(r"(?:^|\.)total_(?:ops|params)$")  # left in a network by thop, which counts operations

Names = dict[str, str | None]  # regular expression -> replacement, or None to drop the key
Outline = Callable[..., Mapping[str, Tensor]]  # keyword arguments of a variant -> outline of the network


@dataclass(frozen=True)
class _File:
    """A state dict of a published checkpoint, as one of the networks that it may be of.

    Attributes:
        wrapper: the key that it is under, if any.
        original: its weights without prefixes, and `weights` under this project's keys.
        variant: keyword arguments of `model.build` for the variant of the network that they fit.
        network: outline of that network.
    """

    arch: str
    wrapper: str | None
    original: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    variant: dict[str, Any]
    network: Mapping[str, Tensor]

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, key) for key in self.original)

    @property
    def differences(self) -> int:
        """How many keys are missing, unexpected or misshapen."""
        own, given = (
            {(key, value.shape) for key, value in weights.items() if not key.endswith("num_batches_tracked")}
            for weights in (self.network, self.weights)
        )
        return len(own ^ given)


@dataclass(frozen=True)
class Project:
    """Layout and normalization of the checkpoints of one project.

    Attributes:
        recognizes: whether a file is one of the project's.
        names: renaming of keys for each architecture, in order, or a function of the file's keys that returns it.
        normalization: mean and std of training, perhaps a function of the network's name; None if not stated.
    """

    name: str
    recognizes: Callable[[_File], bool]
    names: dict[str, Names | Callable[[Mapping[str, Tensor]], Names]] = field(default_factory=dict)
    normalization: MeanStd | Callable[[str], MeanStd | None] | None = None


def load(
    content: Any, arch: str, name: str, builder: Callable[..., nn.Module], source: str
) -> tuple[nn.Module, MeanStd | None, str]:
    """Load the content of a published checkpoint into the network `name` of the architecture `arch`.

    Keys are taken as they are if they match the network, else without the prefixes of wrappers or a prefix that all of
    them have.

    Args:
        builder: builds the network from keyword arguments of `model.build` for its variant.
        source: description of the file and the network, for messages.

    Returns:
        The network; mean and std of the images that it was trained on, None if unknown; and a description of the
        layout that was recognized.

    Raises:
        UserError: it contains no state dict, none that matches the network, or several.
    """
    dicts = _state_dicts(content)
    if not dicts:
        raise UserError(f"{source}: the file has no state dict, neither bare nor under a key such as {WRAPPERS[0]}")
    outline_of = cache(lambda **variant: outline(partial(builder, **variant)))
    files = [_adapt(arch, key, weights, outline_of) for key in dicts for weights in _without_prefixes(dicts[key])]
    file = min(files, key=lambda file: file.differences)
    fitting = dict.fromkeys(other.wrapper for other in files if not other.differences)
    if len(fitting) > 1 and file.wrapper not in WRAPPERS:
        raise UserError(
            f"{source}: the file has several such state dicts, {', '.join(fitting)}: save one of them alone"
        )
    network = build_with(file.weights, partial(builder, **file.variant), source)
    project = next(project for project in PROJECTS if project.recognizes(file))
    normalization = project.normalization(name) if callable(project.normalization) else project.normalization
    place = f" under '{file.wrapper}'" if file.wrapper else ""
    return network, normalization, f"state dict{place} in the layout of {project.name}"


def _state_dicts(content: Any) -> dict[str | None, dict[str, Tensor]]:
    """The state dicts of a file under their keys, those of WRAPPERS first; None is the key of a bare one."""
    if is_state_dict(content):
        return {None: content}
    found = content if isinstance(content, dict) else {}
    return {key: found[key] for key in (*WRAPPERS, *found) if isinstance(key, str) and is_state_dict(found.get(key))}


def _without_prefixes(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A state dict as it is, without the containers of its modules, and without each prefix that all keys then have."""
    yield dict(weights)
    bare = {CONTAINERS.sub("", key): value for key, value in weights.items()}
    if len(bare) < len(weights):  # keys that differ in nothing else
        return
    yield bare
    while len({key.partition(".")[0] for key in bare}) == 1 and all("." in key for key in bare):
        bare = {key.partition(".")[2]: value for key, value in bare.items()}
        yield bare


def _adapt(arch: str, wrapper: str | None, original: Mapping[str, Tensor], outline_of: Outline) -> _File:
    """The weights under this project's keys, and the variant of the network that they fit."""
    weights = {
        key: value
        for key, value in original.items()
        # A counter in floating point was cast with the weights; in half precision it may have overflowed.
        if not (COSTS.search(key) or (key.endswith("num_batches_tracked") and value.is_floating_point()))
    }
    for project in PROJECTS:
        names = project.names.get("torchvision" if is_external(arch) else arch, {})
        weights = _rename(weights, names(weights) if callable(names) else names)
    if arch in ("vgg", "googlenet"):
        weights = _fold_biases(weights)
    variant = _VARIANTS[arch](weights) if arch in _VARIANTS else {}
    return _File(arch, wrapper, original, weights, variant, outline_of(**variant))


def _torchvision_normalization(name: str) -> MeanStd:
    return ((0.5,) * 3, (0.5,) * 3) if name in FROM_TENSORFLOW else NORMALIZATIONS["imagenet"]


def _timm_normalization(name: str) -> MeanStd | None:
    published = importlib.import_module("timm").get_pretrained_cfg(name)
    return (tuple(published.mean), tuple(published.std)) if published else None


def _gal_vgg_names(weights: Mapping[str, Tensor]) -> Names:
    """GAL numbers convolutions and max pools, `features` here convolutions, BatchNorms, ReLUs and max pools."""
    indices = sorted({int(match[1]) for key in weights if (match := re.match(r"features\.conv(\d+)\.", key))})
    layers = [(index, index + 2 * before) for before, index in enumerate(indices)]  # `before` convolutions precede it
    convs = {rf"^features\.conv{index}\.": f"features.{place}." for index, place in layers}
    return convs | {rf"^features\.norm{index}\.": f"features.{place + 1}." for index, place in layers}


# The first entry that recognizes a file gives its normalization.
PROJECTS = (
    Project("timm", lambda file: file.arch == "timm", normalization=_timm_normalization),
    Project(
        "torchvision",
        lambda file: file.arch == "torchvision",
        {
            "torchvision": {
                r"^(aux\d|AuxLogits)\.": None,  # auxiliary classifiers, for training only
                r"(denselayer\d+\.(?:norm|conv))\.([12])\.": r"\1\2.",  # old names of DenseNet's layers
            }
        },
        _torchvision_normalization,
    ),
    Project("the Python file", lambda file: is_external(file.arch)),
    Project(
        "weiaicunzai/pytorch-cifar100",
        lambda file: file.has(r"residual_function") or file.variant.get("hidden") == 4096,
        {
            "resnet": {
                r"^conv1\.0\.": "conv1.",
                r"^conv1\.1\.": "bn1.",
                **{rf"^conv{stage + 1}_x\.": f"layer{stage}." for stage in (1, 2, 3, 4)},
                **{rf"\.residual_function\.{3 * i}\.": f".conv{i + 1}." for i in (0, 1, 2)},
                **{rf"\.residual_function\.{3 * i + 1}\.": f".bn{i + 1}." for i in (0, 1, 2)},
            }
        },
        NORMALIZATIONS["cifar100"],
    ),
    Project(
        "kuangliu/pytorch-cifar",
        lambda file: file.wrapper == "net",
        {"resnet": {r"^linear\.": "fc."}},
        NORMALIZATIONS["cifar"],
    ),
    Project(
        "ResNets of torchvision and timm for ImageNet",
        lambda file: file.variant.get("stem") == "imagenet",
        {"resnet": {r"\.downsample\.": ".shortcut."}},
        NORMALIZATIONS["imagenet"],
    ),
    Project(
        "akamaster/pytorch_resnet_cifar10",
        lambda file: file.wrapper == "state_dict" and file.arch == "resnet" and file.has(r"^linear\.weight$"),
        {"resnet": {r"^linear\.": "fc."}},
        NORMALIZATIONS["imagenet"],
    ),
    Project(
        "ShaohuiLin/GAL",
        lambda file: (
            file.wrapper == "state_dict"
            and (file.variant.get("shortcut") == "A" or file.has(r"^(features\.conv0|dense1\.0\.conv1)\.weight$"))
        ),
        {
            "vgg": _gal_vgg_names,
            "googlenet": {
                r"^inception_": "",
                r"\.branch1x1\.": ".b1.",
                r"\.branch3x3\.": ".b2.",
                r"\.branch5x5\.": ".b3.",
                r"\.branch_pool\.": ".b4.",
            },
        },
        NORMALIZATIONS["cifar"],
    ),
    Project(
        "chenyaofo/pytorch-cifar-models, RepDistiller, mdistiller",  # have the same keys, and state no normalization
        lambda file: file.has(r"\.downsample\.") or file.variant.get("classifier") == "mlp",
        {"resnet": {r"\.downsample\.": ".shortcut."}},
    ),
    Project("this program", lambda file: file.weights.keys() <= file.original.keys()),
    Project("several projects", lambda file: True),
)


def _resnet_variant(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    shortcut = "B" if any(".shortcut." in key for key in weights) else "A"  # option A has no weights
    stem = "imagenet" if "conv1.weight" in weights and weights["conv1.weight"].shape[2:] == (7, 7) else "cifar"
    return {"shortcut": shortcut, "stem": stem}


def _vgg_variant(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    for classifier, first in (("mlp", "classifier.0.bias"), ("norm", "classifier.linear1.bias")):
        if first in weights:
            return {"classifier": classifier, "hidden": weights[first].numel()}
    return {}


_VARIANTS = {"resnet": _resnet_variant, "vgg": _vgg_variant}


def _rename(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        for pattern, name in names.items():
            if name is not None:
                key = re.sub(pattern, name, key)
            elif re.search(pattern, key):
                break
        else:
            renamed[key] = value
    return renamed


def _fold_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the bias of each convolution before a BatchNorm in a Sequential into the running mean: equal in eval mode.

    BatchNorm subtracts the running mean from the output of the convolution, bias included.
    """
    folded = dict(weights)
    for key, bias in weights.items():
        if match := re.fullmatch(r"(.+)\.(\d+)\.bias", key):
            mean = f"{match[1]}.{int(match[2]) + 1}.running_mean"
            if mean in weights and weights[mean].shape == bias.shape:
                folded[mean] = weights[mean].float() - folded.pop(key).float()
    return folded
