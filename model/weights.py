"""Weights from files into networks: no code in a file is run, and weights that do not match are refused."""

import hashlib
import importlib
import mmap
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import is_state_dict


class _Unread:
    """Stands for a harmless object beside the weights. Its own class is never called, and its values are dropped."""

    def __init__(self, *arguments: Any):
        pass

    __setstate__ = __init__


# Classes, by module, of the flags, paths and scores that training scripts save beside the weights.
_UNREAD = {
    "numpy": "dtype ndarray",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "scalar _reconstruct"),
    **dict.fromkeys(("pathlib", "pathlib._local"), "PosixPath WindowsPath PurePosixPath PureWindowsPath"),
    "builtins": "bool int float str bytes tuple list dict frozenset range slice",
    **{"argparse": "Namespace", "types": "SimpleNamespace", "decimal": "Decimal"},
    "datetime": "datetime date time timedelta timezone",
}
_STAND_INS = [(_Unread, f"{module}.{name}") for module, names in _UNREAD.items() for name in names.split()]
_STAND_INS.append((lambda *factory: {}, "collections.defaultdict"))  # which may contain the weights
_STAND_INS.append((lambda *arguments: [], "collections.deque"))  # torch 2.11 appends to nothing but a list


def read_weights(path: Path) -> Any:
    """The content of a file of torch.save or of a .safetensors file, on the CPU: tensors and plain containers.

    No code in it is run. Numpy's values, paths and flags beside the weights are dropped.

    Raises:
        UserError: the file does not exist, is damaged, has objects of other classes (names the first one), or needs
            the package safetensors, which is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        _check_archive(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            warnings.simplefilter("ignore")  # on unusual pickles; they load or raise an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(
            f"{path} needs the package safetensors, which is not installed: pip install safetensors"
        ) from error
    except Exception as error:  # a damaged file can raise anything; torch's advice on it would not be safe to follow
        fault = "it is damaged, cut off, or no checkpoint"
        if unknown := re.search(r"GLOBAL ([\w.]+)", str(error)):
            fault = (
                f"it has a {unknown[1]}, and only weights and plain values are read, since other objects could run "
                "code; save the weights alone, as in torch.save(network.state_dict(), FILE)"
            )
        raise UserError(f"{path} cannot be read as a checkpoint: {fault}") from error


def _check_archive(path: Path) -> None:
    """Check an archive's checksums and unpacked size, and for bytearrays of any length; torch.load does not.

    Raises:
        Exception: the file is damaged, or made to exhaust the memory.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:
            raise ValueError("a bytearray, which no file of weights needs")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_size != entry.file_size for entry in archive.infolist()) or archive.testzip():
                raise ValueError("another archive than torch.save writes, or a damaged one")


def build_with(weights: Mapping[str, Tensor], builder: Callable[[], nn.Module], source: str) -> nn.Module:
    """Build a network and load these weights.

    The match is checked on the meta device first, because a file of a few bytes may ask for a network of any size.

    Raises:
        UserError: they do not match.
    """
    check_match(outline(builder), weights, source)
    network = builder()
    load_weights(network, weights, source)
    return network


def outline(builder: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state dict of the network that `builder` builds, on the meta device if it can be built there."""
    with suppress(Exception), torch.device("meta"):
        return builder().state_dict()
    return builder().state_dict()


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict whose keys match exactly. Only `num_batches_tracked`, which old files lack, may be missing.

    Raises:
        UserError: it does not match; names the first missing, unexpected and misshapen keys.
    """
    own = network.state_dict()
    check_match(own, weights, source)
    network.load_state_dict({**own, **weights})  # a plain dictionary, without the file's version numbers of modules


def load_momentum(optimizer: torch.optim.SGD, state_dict: dict[str, Any], source: str) -> None:
    """Load SGD's momentum buffers from its state dict; the hyperparameters stay those of `optimizer`.

    Raises:
        UserError: they are of other parameters, or malformed.
    """
    states = state_dict.get("state")
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise UserError(f"{source}: momentum is malformed")
    buffers = {str(i): state.get("momentum_buffer") for i, state in states.items()}
    buffers = {i: buffer for i, buffer in buffers.items() if buffer is not None}
    if buffers and not is_state_dict(buffers):
        raise UserError(f"{source}: momentum is malformed")
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    check_match({str(i): own[i] for i in range(len(own)) if str(i) in buffers}, buffers, f"{source}: momentum")
    if buffers:  # zeros for parameters that have had no gradient so far
        states = {i: {"momentum_buffer": buffers.get(str(i), torch.zeros_like(own[i]))} for i in range(len(own))}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def place(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a network to a device, its weights (O, I, H, W) in channels_last; torch refuses those with more axes."""
    formats = {4: torch.channels_last}
    return network._apply(lambda t: t.to(device, memory_format=formats.get(t.dim(), torch.preserve_format)))


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a network's state dict."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_match(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise a UserError unless `given` has the keys, shapes and kinds of dtype of `own`, and is finite."""
    problems = []
    if missing := [key for key in own if key not in given and not key.endswith("num_batches_tracked")]:
        problems.append(f"{len(missing)} missing, first {missing[0]}")
    if unexpected := [key for key in given if key not in own]:
        problems.append(f"{len(unexpected)} unexpected, first {unexpected[0]}")
    if misshapen := [key for key in own if key in given and _form(given[key]) != _form(own[key])]:
        key = misshapen[0]
        problems.append(f"{key} is {_form(given[key])} in the file, {_form(own[key])} in the network")
    if problems:
        raise UserError(f"{source} does not match: {'; '.join(problems)}")
    for key, value in given.items():
        if not value.to(own[key].dtype).isfinite().all():
            raise UserError(f"{source} cannot be used: {key} holds values that are not finite")


def _form(tensor: Tensor) -> str:
    """Shape and kind of dtype (floating point, complex, integer), but not its precision."""
    kind = "complex" if tensor.is_complex() else "" if tensor.is_floating_point() else "whole"
    return f"{tuple(tensor.shape)} {kind}".strip()
