"""timm's protocol, which online teachers and attention need, for networks that do not follow it."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from utils.errors import UserError, first_line

PROTOCOL = ("forward_features", "forward_head", "num_features")
ADVICE = f"give it {', '.join(PROTOCOL)}, as timm's networks have"


def check_features(network: nn.Module, name: str, input_size: Sequence[int]) -> None:
    """Raise a UserError unless the network follows the protocol, or can be split to, on images of input_size."""
    split(network, input_size)
    try:
        shadow = copy.deepcopy(network).to("meta").eval()
        with torch.no_grad():
            features = shadow.forward_features(torch.empty(1, *input_size, device="meta"))
    except Exception as error:  # a network of others may raise anything
        size = " x ".join(map(str, input_size[1:]))
        raise UserError(f"{name} does not take images of {size}: {first_line(error)}") from error
    if features.dim() != 4 or features.shape[1] != network.num_features:
        raise UserError(
            f"{name} has no feature map (B, {network.num_features}, H, W) for this --method, but one of "
            f"{tuple(features.shape)}: choose another network"
        )


def split(network: nn.Module, input_size: Sequence[int]) -> None:
    """Give a network timm's protocol: `forward_features` up to its last feature map, `forward_head` from there.

    A network that follows it stays as it is. Otherwise, its class becomes a subclass of its own, and its modules and
    their names stay. The map is the last one with more than one pixel from which everything after it is computed.
    Shapes are those for images of at least 224 x 224, which most networks take, so that the map before global pooling
    has more than one pixel.

    Raises:
        UserError (a ValueError): its forward cannot be traced, or no single feature map leads to its logits.
    """
    if all(hasattr(network, part) for part in PROTOCOL):
        return
    kind, was_training = type(network), network.training
    halves, channels = {}, 0
    for training in (True, False):  # forward may depend on it
        network.train(training)
        try:
            graph = _RootTracer().trace(network)
        except Exception as error:  # forward may raise anything
            fault = f"{kind.__name__} cannot be split into features and head ({first_line(error)})"
            raise UserError(f"{fault}: {ADVICE}") from error
        cut, channels = _last_feature_map(network, graph, input_size)
        nodes = list(graph.nodes)
        end = nodes.index(cut) + 1
        halves[training] = _function(network, nodes[:end]), _function(network, nodes[end:], cut)
    network.train(was_training)

    def forward_features(self: nn.Module, x: Tensor) -> Tensor:
        return halves[self.training][0](self, x)

    def forward_head(self: nn.Module, features: Tensor) -> Tensor:
        return halves[self.training][1](self, features.contiguous())  # a head may flatten the map with view

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    methods = {function.__name__: function for function in (forward_features, forward_head, forward)}
    network.__class__ = type(kind.__name__, (kind,), {**methods, "num_features": channels})


class _RootTracer(fx.Tracer):
    """Traces the forward of the network alone, and no modules in it, whose code may be untraceable."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _last_feature_map(network: nn.Module, graph: fx.Graph, input_size: Sequence[int]) -> tuple[fx.Node, int]:
    """The node of the feature map at which to split, and its number of channels."""
    channels, height, width = input_size
    for size in ((max(height, 224), max(width, 224)), (height, width)):
        try:
            shapes = _shapes(network, graph, (2, channels, *size))
            break
        except Exception as exception:  # a network of others may raise anything
            error = exception
    else:
        raise UserError(f"{type(network).__name__} does not take images of {height} x {width}: {first_line(error)}")
    maps, reach = [], 0  # reach: how far the nodes so far are used
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node, i in position.items():
        if reach <= i and len(shapes.get(node, ())) == 4 and node.op != "placeholder":
            maps.append(node)
        reach = max([reach, *(position[user] for user in node.users)])
    if not maps:
        fault = f"{type(network).__name__} has no feature map (B, C, H, W) that all of its logits are computed from"
        raise UserError(f"{fault}: {ADVICE}")
    chosen = next((node for node in reversed(maps) if shapes[node][2] * shapes[node][3] > 1), maps[-1])
    return chosen, shapes[chosen][1]


def _shapes(network: nn.Module, graph: fx.Graph, size: tuple[int, ...]) -> dict[fx.Node, torch.Size]:
    """The shape of every tensor in the graph, found on the meta device."""
    shadow = copy.deepcopy(network).to("meta")
    interpreter = fx.Interpreter(shadow, garbage_collect_values=False, graph=graph)
    with torch.no_grad():
        interpreter.run(torch.empty(size, device="meta"))
    return {node: value.shape for node, value in interpreter.env.items() if isinstance(value, Tensor)}


def _function(network: nn.Module, nodes: list[fx.Node], source: fx.Node | None = None) -> Callable[..., Tensor]:
    """The function (network, x) -> Tensor that computes these nodes of its graph, where `source`, if given, is x."""
    graph, copies = fx.Graph(), {}
    if source:
        copies[source] = graph.placeholder("features")
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if nodes[-1].op != "output":
        graph.output(copies[nodes[-1]])
    return type(fx.GraphModule(network, graph)).forward
