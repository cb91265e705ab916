"""Networks to deploy: files that need neither this project nor, as ONNX, PyTorch.

Whatever the format, the network takes images (B, 3, H, W), float32 in 0 .. 1, in batches of any size, normalizes them,
and gives logits (B, K). It consists of standard operators, with BatchNorm folded into the convolutions before it.
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
from utils.errors import UserError, first_line
from utils.files import atomic_write
from utils.job import deployed

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of the logits
# Channels of a group from which on a group convolution is fast in ONNX Runtime: with fewer, a wider one is faster.
WIDE_GROUP = 16
# What the metadata of an ONNX file says: strings as they are, everything else as JSON.
METADATA = (
    "classes", "accuracy", "input_size", "preprocessing", "mean", "std", "model", "conv", "groups", "pruned_num"
)  # fmt: skip

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_FROM_SOURCE = ("stack_trace", "nn_module_stack", "from_node", "source_fn_stack", "torch_fn")


class Agreement(NamedTuple):
    """How ONNX Runtime's answers for `images` images compare with PyTorch's.

    differing: images for which it finds another class; difference: the largest of the logits, NaN if some are none.
    """

    images: int
    differing: int
    difference: float

    @property
    def holds(self) -> bool:
        return self.differing == 0 and self.difference <= TOLERANCE

    def __str__(self) -> str:
        found = "the class that PyTorch finds for each"
        if self.differing:
            found = f"another class than PyTorch for {self.differing:,}"
        return (
            f"ONNX Runtime finds {found} of {self.images:,} test images, and logits that differ by at most "
            f"{self.difference:.1e}"
        )


class Deployment(NamedTuple):
    """What `write` wrote: the files, the content of the ONNX file and how it agrees, and what it failed to write."""

    files: list[Path]
    onnx: bytes | None
    agreement: Agreement | None
    failures: list[str]

    def lines(self) -> list[str]:
        """For the log."""
        files = [f"also exported {', '.join(map(str, self.files))}"] if self.files else []
        return [*files, *self.notes(), *self.doubts()]

    def notes(self) -> list[str]:
        """What a report says of an ONNX file that is as it should be."""
        return [f"{self.agreement}."] if self.agreement and self.agreement.holds else []

    def doubts(self) -> list[str]:
        failed = [f"Failed: {failure}." for failure in self.failures]
        if self.agreement and not self.agreement.holds:
            failed.append(f"Look into the ONNX file before relying on it: {self.agreement}.")
        return failed

    def as_json(self) -> dict[str, Any]:
        files = [path.name for path in self.files]
        agreement = self.agreement and self.agreement._asdict()
        if agreement and math.isnan(agreement["difference"]):
            agreement["difference"] = None
        return {"files": files, "agreement": agreement, "failures": self.failures}


def check_packages(formats: Sequence[str]) -> None:
    """Raise a UserError unless the packages that these formats need are installed."""
    if "onnx" not in formats:
        return
    try:
        for package in ONNX_PACKAGES:
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"--export onnx needs packages: pip install {' '.join(ONNX_PACKAGES)} ({error})") from error


def write(
    exported: Path, network: nn.Module, meta: dict[str, Any], formats: Sequence[str], test: Batches
) -> Deployment:
    """Write a network in each of the formats, beside its file `exported`; compare the one in ONNX with it.

    Whatever goes wrong is told in `failures`, one line each.

    Args:
        meta: the network's, as `checkpoint.load_student` gives it.
        test: the images to compare on.
    """
    written = Deployment([], None, None, [])
    try:
        graph = fold(network, meta) if formats else None
    except Exception as error:  # the network may be anybody's
        return written._replace(failures=[f"not exported as {', '.join(formats)}: {first_line(error)}"])
    for form in formats:
        path = deployed(exported, form)
        try:
            content = WRITERS[form](graph, meta)
            with atomic_write(path) as file:
                file.write(content)
        except Exception as error:
            written.failures.append(f"not exported as {form}: {first_line(error)}")
            continue
        written.files.append(path)
        if form == "onnx":
            written = written._replace(onnx=content)
            try:
                written = written._replace(agreement=compare(session(content), network, meta, test))
            except Exception as error:
                written.failures.append(f"{path.name} does not run: {first_line(error)}")
    return written


def fold(network: nn.Module, meta: dict[str, Any]) -> fx.GraphModule:
    """The network to deploy as a graph of aten's operators, on the CPU, for batches of images in any number.

    Args:
        meta: of which it takes `input_size` (C, H, W), `mean` and `std`.

    Raises:
        Exception: torch.export cannot make a graph of it.
    """
    module = _Deployable(network, meta)
    with _quiet():
        graph = _to_program(module, meta).module()
    _fold_norms(graph)
    return graph


def to_onnx(graph: fx.GraphModule, meta: dict[str, Any]) -> bytes:
    """An ONNX file, with METADATA, whose input is called `images` and whose output `logits`.

    Raises:
        Exception: PyTorch cannot translate this graph.
    """
    import onnx

    names = {"input_names": ["images"], "output_names": ["logits"]}
    with _quiet():
        model = torch.onnx.export(_to_program(graph, meta), dynamo=True, verbose=False, **names).model_proto
    parts = model.graph
    for part in (model, parts, *parts.node, *parts.initializer, *parts.input, *parts.output):
        del part.metadata_props[:]  # PyTorch's notes on where in the source code each of them comes from
    del parts.value_info[:]
    for value in (*parts.input, *parts.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    parts.input[0].doc_string = "RGB in 0 .. 1: the graph itself normalizes, by the metadata's mean and std"
    said = {key: meta[key] for key in METADATA if key in meta}
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
    onnx.helper.set_model_props(model, said)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def to_torchscript(graph: fx.GraphModule, meta: dict[str, Any]) -> bytes:
    """A file for torch.jit.load. Raises an Exception if PyTorch cannot translate this graph."""
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(graph, _example(meta), check_trace=False)
        torch.jit.save(torch.jit.freeze(traced.eval()), buffer)
    return buffer.getvalue()


def to_pt2(graph: fx.GraphModule, meta: dict[str, Any]) -> bytes:
    """A file for torch.export.load. Raises an Exception if PyTorch cannot translate this graph."""
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(_to_program(graph, meta), buffer)
    return buffer.getvalue()


WRITERS = dict(zip(FORMATS, (to_onnx, to_torchscript, to_pt2), strict=True))


def standard_onnx(network: nn.Module, meta: dict[str, Any]) -> bytes | None:
    """The ONNX file of a network to compare with; None if PyTorch cannot export it."""
    try:
        return to_onnx(fold(network, meta), meta)
    except Exception:  # it may be anybody's, and the student may have been split where it could not be traced
        return None


def session(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """An ONNX file as a function, images -> logits, that ONNX Runtime computes on as many CPU threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between its runs the cores are others'
    inference = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: inference.run(["logits"], {"images": images})[0]


def runtime_version() -> str:
    return importlib.import_module("onnxruntime").__version__


def compare(
    run: Callable[[np.ndarray], np.ndarray], network: nn.Module, meta: dict[str, Any], test: Batches
) -> Agreement:
    """How the answers of `run` to the images of `test`, and to one image alone, compare with the network's.

    `run` gets the pixels as they were before normalization; the network computes in float32 on the CPU.
    """
    network = copy.deepcopy(network).cpu().eval()
    mean, std = _statistics(meta)
    count = differing = difference = 0
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
    return Agreement(count, differing, float(difference))


class _Deployable(nn.Module):
    """A copy of a network that takes pixels in 0 .. 1, with the convolutions that runtimes compute best."""

    def __init__(self, network: nn.Module, meta: dict[str, Any]):
        super().__init__()
        self.network = copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format)
        for module in list(self.network.modules()):
            for name, child in module.named_children():
                if isinstance(child, Shift2d):
                    setattr(module, name, child.as_conv())
                elif isinstance(child, CheapConv2d) and child.is_plain:
                    setattr(module, name, child.as_convs(WIDE_GROUP))
        mean, std = _statistics(meta)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def _fold_norms(graph: fx.GraphModule) -> None:
    """Fold every BatchNorm over the output of a convolution, which nothing else takes, into that convolution."""
    folded = 0
    for norm in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default):
        conv, (weight, bias, mean, var), training, eps = norm.args[0], norm.args[1:5], norm.args[5], norm.args[7]
        if conv.target not in _CONVOLUTIONS or len(conv.users) > 1 or training:
            continue
        images, kernel, offset, *window = (*conv.args, None)[:3] + conv.args[3:]
        stored = (kernel, offset, mean, var, weight, bias)
        if any(node is not None and node.op != "get_attr" for node in stored):  # computed by the network itself
            continue
        kernel, offset, mean, var, weight, bias = (_stored(graph, node) for node in stored)
        fused = fuse_conv_bn_weights(kernel, offset, mean, var, eps, weight, bias)
        new = []
        for value, kind in zip(fused, ("weight", "bias"), strict=True):
            name = f"folded_{folded}_{kind}"
            graph.register_buffer(name, value.detach())
            with graph.graph.inserting_before(conv):
                new.append(graph.graph.get_attr(name))
        conv.args = (images, *new, *window)
        norm.replace_all_uses_with(conv)
        graph.graph.erase_node(norm)
        folded += 1
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _stored(graph: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    return None if node is None else operator.attrgetter(node.target)(graph)


def _to_program(module: nn.Module, meta: dict[str, Any]) -> ExportedProgram:
    with torch.no_grad():
        program = torch.export.export(module, (_example(meta),), dynamic_shapes=({0: Dim("batch", min=1)},))
    for node in program.graph.nodes:
        for key in _FROM_SOURCE:
            node.meta.pop(key, None)
    return program


def _example(meta: dict[str, Any]) -> Tensor:
    return torch.zeros(2, *meta["input_size"])  # 1 would be taken for a constant


def _statistics(meta: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(meta[key])[:, None, None] for key in ("mean", "std"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what PyTorch says while it exports from the terminal: what matters of it is in its errors."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
