"""Export to files that need neither this project nor, as ONNX, PyTorch.

In every format the network takes images (B, 3, H, W), float32 in 0 .. 1, for any B, normalizes them and returns logits
(B, K). It consists of standard operators, with BatchNorm folded into the convolutions before it.
"""

import copy
import importlib
import io
import json
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from data.loader import Batches
from model.conv import CheapConv2d, Shift2d
from utils.config import FORMATS
from utils.errors import first_line
from utils.files import atomic_write
from utils.job import deployed

OPSET = 18  # of ONNX, the lowest that PyTorch exports to without a conversion
TOLERANCE = 1e-4  # of the logits, relative to the largest one or to 1
WIDE_GROUP = 16  # channels per group below which ONNX Runtime is faster with merged, wider groups
# Metadata of an ONNX file: strings as they are, everything else as JSON.
METADATA = (
    *("classes", "accuracy", "input_size", "preprocessing", "mean", "std"),
    *("model", "conv", "groups", "pruned_num"),
)

Session = Callable[[np.ndarray], np.ndarray]  # images (B, 3, H, W) -> logits (B, K)
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_FROM_SOURCE = ("stack_trace", "nn_module_stack", "from_node", "source_fn_stack", "torch_fn")


class Agreement(NamedTuple):
    """How the logits of ONNX Runtime compare with PyTorch's on test images."""

    images: int
    differing: int  # images with another predicted class
    difference: float  # largest absolute difference of logits, or NaN
    largest: float  # largest absolute value of PyTorch's logits

    @property
    def holds(self) -> bool:
        """Whether all logits are equal up to rounding; another class is then a tie of two."""
        return self.difference <= TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        others = f"another class than PyTorch for {self.differing:,}"
        found = others if self.differing else "the class that PyTorch finds for each"
        differ = f"logits, {self.largest:.2g} at most, that differ by up to {self.difference:.1e}"
        return f"ONNX Runtime finds {found} of {self.images:,} test images, and {differ}"


@dataclass
class Deployment:
    """The files that `write` wrote, and what failed, one line each."""

    files: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    onnx: bytes | None = None  # content of the ONNX file
    agreement: Agreement | None = None

    def notes(self) -> list[str]:
        """For the report, on an ONNX file that agrees."""
        return [f"{self.agreement}."] if self.agreement and self.agreement.holds else []

    def doubts(self) -> list[str]:
        """For the report, on failures and on an ONNX file that does not agree."""
        failed = [f"Failed: {failure}." for failure in self.failures]
        if self.agreement and not self.agreement.holds:
            failed.append(f"Look into the ONNX file before relying on it: {self.agreement}.")
        return failed

    def as_json(self) -> dict[str, Any]:
        agreement = self.agreement and {
            name: value if math.isfinite(value) else None for name, value in self.agreement._asdict().items()
        }
        return {"files": [path.name for path in self.files], "agreement": agreement, "failures": self.failures}


def write(
    exported: Path, network: nn.Module, meta: dict[str, Any], formats: Sequence[str], test: Batches
) -> Deployment:
    """Write a network in each format beside its file `exported`, and compare its ONNX file with it on `test`.

    It does not raise: failures are part of the result.

    Args:
        meta: metadata of the network, as `checkpoint.load_student` returns them.
    """
    written = Deployment()

    @contextmanager
    def noting(failure: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the network may be the user's own and fail in any way
            written.failures.append(f"{failure}: {first_line(error)}")

    graph = None
    with noting(f"not exported as {', '.join(formats)}"):
        graph = fold(network, meta) if formats else None
    for form in formats if graph else ():
        path = deployed(exported, form)
        with noting(f"not exported as {form}"):
            content = WRITERS[form](graph, meta)
            with atomic_write(path) as file:
                file.write(content)
            written.files.append(path)
            if form == "onnx":
                written.onnx = content
    if written.onnx:
        with noting(f"{deployed(exported, 'onnx').name} does not run"):
            written.agreement = compare(session(written.onnx), network, meta, test)
    return written


def fold(network: nn.Module, meta: dict[str, Any]) -> fx.GraphModule:
    """Fold the network into a graph of aten operators on the CPU, for any batch size.

    Args:
        meta: `input_size` (C, H, W), `mean` and `std` are used.

    Raises:
        Exception: torch.export cannot make a graph of it.
    """
    with _quiet():
        graph = _to_program(_Deployable(network, meta), meta).module()
    _fold_norms(graph)
    return graph


def to_onnx(graph: fx.GraphModule, meta: dict[str, Any]) -> bytes:
    """Content of an ONNX file with METADATA; its input is `images`, its output `logits`.

    Raises:
        Exception: PyTorch cannot translate this graph.
    """
    import onnx

    names = {"input_names": ["images"], "output_names": ["logits"]}
    with _quiet():
        program = torch.onnx.export(_to_program(graph, meta), dynamo=True, verbose=False, opset_version=OPSET, **names)
    model = program.model_proto
    parts = model.graph
    _pool_globally(parts)
    _lower_opset(model)
    for part in (model, parts, *parts.node, *parts.initializer, *parts.input, *parts.output):
        del part.metadata_props[:]  # PyTorch's notes on the source code of each
    del parts.value_info[:]
    for value in (*parts.input, *parts.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    parts.input[0].doc_string = "RGB in 0 .. 1: the graph itself normalizes, by the metadata's mean and std"
    stated = {key: meta[key] for key in METADATA if key in meta}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in stated.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def to_torchscript(graph: fx.GraphModule, meta: dict[str, Any]) -> bytes:
    """Content of a file for torch.jit.load; raises an Exception if PyTorch cannot translate this graph."""
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(graph, _example(meta), check_trace=False)
        torch.jit.save(torch.jit.freeze(traced.eval()), buffer)
    return buffer.getvalue()


def to_pt2(graph: fx.GraphModule, meta: dict[str, Any]) -> bytes:
    """Content of a file for torch.export.load; raises an Exception if PyTorch cannot translate this graph."""
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(_to_program(graph, meta).run_decompositions(), buffer)
    return buffer.getvalue()


WRITERS = dict(zip(FORMATS, (to_onnx, to_torchscript, to_pt2), strict=True))


def session(content: bytes) -> Session:
    """The network of an ONNX file, run by ONNX Runtime in as many CPU threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")  # leaves the cores free between runs
    inference = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: inference.run(["logits"], {"images": images})[0]


def runtime_version() -> str:
    return importlib.import_module("onnxruntime").__version__


def compare(run: Session, network: nn.Module, meta: dict[str, Any], test: Batches) -> Agreement:
    """Compare the logits of `run` with the network's on the images of `test`; the first one also as a batch of one.

    `run` gets the pixels before normalization; the network runs in float32 on the CPU.
    """
    network = copy.deepcopy(network).cpu().eval()
    mean, std = _by_channel(meta["mean"]), _by_channel(meta["std"])
    count = differing = difference = largest = 0
    with torch.inference_mode():
        for images, _ in test:
            images = images.cpu()
            pixels = ((images * std + mean) * 255).round().div(255).contiguous().numpy()
            expected, answers = network(images).numpy(), run(pixels)
            if count == 0:
                answers[0] = run(pixels[:1])[0]
            count += len(images)
            differing += int((answers.argmax(1) != expected.argmax(1)).sum())
            difference = np.maximum(difference, np.abs(answers - expected).max())  # NaN if one of them is
            largest = np.maximum(largest, np.abs(expected).max())
    return Agreement(count, differing, float(difference), float(largest))


class _Deployable(nn.Module):
    """Copy of a network that takes pixels in 0 .. 1, with cheap convolutions in the form that runtimes run fastest."""

    def __init__(self, network: nn.Module, meta: dict[str, Any]):
        super().__init__()
        self.network = copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format)
        for module in list(self.network.modules()):
            for name, child in module.named_children():
                if isinstance(child, Shift2d):
                    setattr(module, name, child.as_conv())
                elif isinstance(child, CheapConv2d) and child.is_plain:
                    setattr(module, name, child.as_convs(WIDE_GROUP))
        for name in ("mean", "std"):
            self.register_buffer(name, _by_channel(meta[name]))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def _fold_norms(graph: fx.GraphModule) -> None:
    """Fold every BatchNorm into the convolution before it, unless something else uses that convolution's output."""
    norms = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    for i, norm in enumerate(norms):
        conv, scale, shift, mean, var, training, _, eps, _ = norm.args
        if conv.target not in _CONVOLUTIONS or len(conv.users) > 1 or training:
            continue
        images, weight, bias, *window = (*conv.args, None)[:3] + conv.args[3:]
        nodes = (weight, bias, mean, var, scale, shift)
        if any(node is not None and node.op != "get_attr" for node in nodes):  # computed by the network itself
            continue
        weight, bias, mean, var, *affine = (node and operator.attrgetter(node.target)(graph) for node in nodes)
        folded = fuse_conv_bn_weights(weight, bias, mean, var, eps, *affine)
        for kind, value in zip(("weight", "bias"), folded, strict=True):
            graph.register_buffer(f"folded_{i}_{kind}", value.detach())
        with graph.graph.inserting_before(conv):
            conv.args = (images, *(graph.graph.get_attr(f"folded_{i}_{kind}") for kind in ("weight", "bias")), *window)
        norm.replace_all_uses_with(conv)
        graph.graph.erase_node(norm)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _lower_opset(model: Any) -> None:
    """State the lowest opset, 14 or above, that has the operators of an onnx.ModelProto, for old readers."""
    from onnx import defs, helper

    def version(node: Any) -> int:
        if node.op_type == "Pad":  # its fourth input, axes, came with 18
            wraps = any(attribute.name == "mode" and attribute.s == b"wrap" for attribute in node.attribute)
            return 19 if wraps else 18 if len(node.input) > 3 else 13
        if node.op_type == "BatchNormalization":  # 15 allows more types of numbers
            return 14
        if node.domain or any(attribute.HasField("g") for attribute in node.attribute):  # not looked into
            return OPSET
        return defs.get_schema(node.op_type, OPSET).since_version

    model.opset_import[0].version = max(14, *map(version, model.graph.node))
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)


def _pool_globally(graph: Any) -> None:
    """Replace ReduceMean over height and width by GlobalAveragePool, and Reshape to (-1, n) by Flatten, in place.

    More readers of ONNX take these, in any version and with changing batch sizes.

    Args:
        graph: an onnx.GraphProto with `value_info`.
    """
    from onnx.helper import make_node
    from onnx.numpy_helper import to_array

    constants = {tensor.name: to_array(tensor).tolist() for tensor in graph.initializer if len(tensor.dims) == 1}
    values = (*graph.value_info, *graph.input)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    unused = set()
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if node.op_type not in ("ReduceMean", "Reshape") or len(node.input) != 2:
            continue
        (source, parameter), output, shape = node.input, node.output[0], shapes.get(node.input[0], ())
        constant = constants.get(parameter)
        if node.op_type == "Reshape" and len(shape) > 1 and constant == [-1, math.prod(shape[1:])]:
            node.CopyFrom(make_node("Flatten", [source], [output], node.name))
        elif node.op_type == "ReduceMean" and len(shape) == 4 and {axis % 4 for axis in constant or ()} == {2, 3}:
            keeps = any(attribute.name == "keepdims" and attribute.i for attribute in node.attribute)
            pooled = output if keeps else f"{output}_pooled"
            node.CopyFrom(make_node("GlobalAveragePool", [source], [pooled], node.name))
            if not keeps:
                graph.node.insert(i + 1, make_node("Flatten", [pooled], [output], f"{node.name}_flatten"))
        else:
            continue
        unused.add(parameter)
    unused -= {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in unused]:
        graph.initializer.remove(tensor)


def _to_program(module: nn.Module, meta: dict[str, Any]) -> ExportedProgram:
    with torch.no_grad():
        program = torch.export.export(module, (_example(meta),), dynamic_shapes=({0: Dim("batch", min=1)},))
    for node in program.graph.nodes:
        for key in _FROM_SOURCE:
            node.meta.pop(key, None)
    return program


def _example(meta: dict[str, Any]) -> Tensor:
    return torch.zeros(2, *meta["input_size"])  # a batch size of 1 would become a constant


def _by_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch's messages while it exports: its errors contain what matters."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
