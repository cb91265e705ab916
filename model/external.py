"""Networks of other projects: torchvision's classifiers, timm's, or what a function in a Python file builds."""

import copy
import difflib
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, fx, nn

from model.convert import cheapen, replaceable_convs
from utils.errors import UserError
from utils.normalization import NORMALIZATIONS, MeanStd

LIBRARIES = ("torchvision", "timm")
FROM_TENSORFLOW = ("googlenet", "inception_v3")  # torchvision's published weights are converted from there
PROTOCOL = ("forward_features", "forward_head", "num_features")  # timm's


def is_external(arch: str | None) -> bool:
    """Whether --arch names a library or a Python file rather than an architecture of this project."""
    return arch in LIBRARIES or is_file(arch)


def is_file(arch: str | None) -> bool:
    return arch is not None and arch.endswith(".py")


def check(arch: str, name: str) -> None:
    """Raise a UserError unless `arch` has a network `name`."""
    if is_file(arch):
        _function(arch, name)
    else:
        known = _library(arch)[1]
        if name.split(".")[0] not in known:  # timm's names may say after a dot which weights were meant
            close = ", ".join(difflib.get_close_matches(name, known, n=6)) or "its documentation for the names"
            raise UserError(f"{arch} has no network '{name}': try {close}")


def standard(arch: str, name: str, num_classes: int, input_size: Sequence[int] | None = None) -> nn.Module:
    """The network `name` of `arch`, with fresh weights.

    Args:
        input_size: (C, H, W) of its images, for `split`, by which the network of a Python file may hold its maps in
            channels_last and still view the last one as a row.

    Raises:
        UserError (a ValueError): unknown arch or name, a library that is not installed.
    """
    check(arch, name)
    if not is_file(arch):
        # These two alone have auxiliary classifiers, whose losses are no part of the objective.
        options = {"aux_logits": False, "init_weights": True} if name in FROM_TENSORFLOW else {}
        return _library(arch)[0](name, num_classes=num_classes, **options)
    function = _function(arch, name)
    takes_classes = "num_classes" in inspect.signature(function).parameters
    network = function(num_classes=num_classes) if takes_classes else function()
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} of {arch} returned a {type(network).__name__}, not a torch.nn.Module")
    if input_size and not follows_protocol(network):
        with suppress(UserError):  # as a teacher it may be of any form
            split(network, input_size)
    return network


def student(
    arch: str,
    name: str,
    num_classes: int,
    conv: str,
    groups: int,
    pruned_num: int | None,
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    """The same network with cheap convolutions.

    Args:
        conv, groups, pruned_num: as `model.convert.cheapen` takes them.
        input_size: (C, H, W) of its images; given these, the network follows timm's protocol.

    Raises:
        UserError (a ValueError): as `standard` and `cheapen`; nothing to replace; no feature map to be found.
    """
    network = standard(arch, name, num_classes)
    if not replaceable_convs(network):
        raise UserError(f"{name} of {arch} has no standard convolution to make cheap but the first: choose another one")
    cheapen(network, conv, groups, pruned_num)
    if input_size and not follows_protocol(network):
        split(network, input_size)
    return network


def follows_protocol(network: nn.Module) -> bool:
    return all(hasattr(network, part) for part in PROTOCOL)


def normalization(arch: str, name: str) -> MeanStd | None:
    """Mean and std with which a library's published weights of `name` were trained; None where nothing is known."""
    if arch == "timm":
        published = importlib.import_module("timm").get_pretrained_cfg(name)
        return (tuple(published.mean), tuple(published.std)) if published else None
    if arch == "torchvision":
        return ((0.5,) * 3, (0.5,) * 3) if name in FROM_TENSORFLOW else NORMALIZATIONS["imagenet"]
    return None


def from_public(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's files keep auxiliary classifiers, which only training uses, and old names of DenseNet's layers."""
    auxiliary = re.compile(r"(aux\d|AuxLogits)\.")
    old_name = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
    return {old_name.sub(r"\1\2.", key): value for key, value in weights.items() if not auxiliary.match(key)}


def split(network: nn.Module, input_size: Sequence[int]) -> None:
    """Give a network timm's protocol: `forward_features` up to its last feature map, `forward_head` from there.

    The network becomes of a subclass of its own class; its modules and their names stay as they are. The map is the
    last one of more than one pixel that all that follows is computed from. It is looked for on images of at least
    224 x 224, which most networks take, so that a map before global pooling has more than one.

    Raises:
        UserError (a ValueError): its forward cannot be traced, or no single feature map leads to its logits.
    """
    kind, was_training = type(network), network.training
    halves, channels = {}, 0
    for training in (True, False):  # what forward does may depend on it
        network.train(training)
        try:
            graph = _RootTracer().trace(network)
        except Exception as error:  # forward is anybody's code
            raise UserError(
                f"{kind.__name__} cannot be split into features and head ({_first_line(error)}): give it "
                f"{', '.join(PROTOCOL)}, as timm's networks have"
            ) from error
        cut, channels = _last_feature_map(network, graph, input_size)
        halves[training] = _features(network, graph, cut), _head(network, graph, cut)
    network.train(was_training)

    def forward_features(self: nn.Module, x: Tensor) -> Tensor:
        return halves[self.training][0](self, x)

    def forward_head(self: nn.Module, features: Tensor) -> Tensor:
        return halves[self.training][1](self, features.contiguous())  # it may view the map as a row

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    methods = {function.__name__: function for function in (forward_features, forward_head, forward)}
    network.__class__ = type(kind.__name__, (kind,), {**methods, "num_features": channels})


class _RootTracer(fx.Tracer):
    """Sees what the network itself does, and takes its modules as they are: any code may be in them."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _last_feature_map(network: nn.Module, graph: fx.Graph, input_size: Sequence[int]) -> tuple[fx.Node, int]:
    """The node that computes it, and its channels."""
    channels, height, width = input_size
    shapes, error = {}, None
    for size in ((max(height, 224), max(width, 224)), (height, width)):
        try:
            shapes = _shapes(network, graph, (2, channels, *size))
            break
        except Exception as exception:  # anybody's code
            error = exception
    if not shapes:
        raise UserError(f"{type(network).__name__} does not take images of {height} x {width}: {_first_line(error)}")
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    maps = [
        node
        for i, node in enumerate(nodes)
        if len(shapes.get(node, ())) == 4
        and node.op != "placeholder"
        and all(position[source] >= i for later in nodes[i + 1 :] for source in later.all_input_nodes)
    ]
    if not maps:
        raise UserError(
            f"{type(network).__name__} has no feature map (B, C, H, W) that all of its logits are computed from: give "
            f"it {', '.join(PROTOCOL)}, as timm's networks have"
        )
    chosen = next((node for node in reversed(maps) if shapes[node][2] * shapes[node][3] > 1), maps[-1])
    return chosen, shapes[chosen][1]


def _shapes(network: nn.Module, graph: fx.Graph, size: tuple[int, ...]) -> dict[fx.Node, torch.Size]:
    """The shape of every tensor that the graph computes; without computing it."""
    shapes = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            result = super().run_node(node)
            if isinstance(result, Tensor):
                shapes[node] = result.shape
            return result

    with torch.no_grad():
        Recorder(_on_meta(network), graph=graph).run(torch.empty(size, device="meta"))
    return shapes


def _features(network: nn.Module, graph: fx.Graph, cut: fx.Node) -> Callable[[nn.Module, Tensor], Tensor]:
    """The function (network, images) -> feature map."""
    features, copies = fx.Graph(), {}
    for node in graph.nodes:
        copies[node] = features.node_copy(node, copies.__getitem__)
        if node is cut:
            break
    features.output(copies[cut])
    return type(fx.GraphModule(network, features)).forward


def _head(network: nn.Module, graph: fx.Graph, cut: fx.Node) -> Callable[[nn.Module, Tensor], Tensor]:
    """The function (network, feature map) -> logits."""
    head, nodes = fx.Graph(), list(graph.nodes)
    copies = {cut: head.placeholder("features")}
    for node in nodes[nodes.index(cut) + 1 :]:
        copies[node] = head.node_copy(node, copies.__getitem__)
    return type(fx.GraphModule(network, head)).forward


def _on_meta(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).to("meta")


def _library(arch: str) -> tuple[Callable[..., nn.Module], list[str]]:
    """What creates a network of a library by name, and the names."""
    try:
        if arch == "torchvision":
            models = importlib.import_module("torchvision.models")
            return models.get_model, models.list_models(module=models)
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(
            f"--arch {arch} needs the package {arch}, which is not installed: pip install {arch}"
        ) from error
    return timm.create_model, timm.list_models()


def _function(arch: str, name: str) -> Callable[..., nn.Module]:
    """The function `name` of the Python file `arch`."""
    module = _load_file(Path(arch).resolve())
    if not callable(getattr(module, name, None)):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(f"{arch} defines no function '{name}': it has {', '.join(own) or 'none'}")
    return getattr(module, name)


@functools.cache
def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"--arch {path} does not exist: name a Python file, or an architecture")
    sys.path.append(str(path.parent))  # for what it imports from beside itself
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _first_line(error: Exception | None) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
