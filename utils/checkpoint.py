"""Files of weights: training checkpoints, exported networks, and reading either without running any code in it.

A training checkpoint holds everything to go on from: all students, the online teacher, the optimizer, the best so far.
An exported network is one network alone. Both carry the same `meta`, which says how to build the network and what it
was trained on, so that a file needs nothing beside it. Plain dictionaries of tensors, numbers and strings.
"""

import argparse
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import build
from model.external import is_file
from utils.errors import UserError
from utils.files import atomic_write

CHECKPOINT, NETWORK = "training checkpoint", "exported network"
_KEYS = {
    CHECKPOINT: {"epoch", "model", "optimizer", "scores", "best", "meta"},
    NETWORK: {"state_dict", "meta"},
}
_META_KEYS = {
    "arch", "model", "conv", "groups", "pruned_num", "num_classes", "classes", "input_size", "mean", "std", "config"
}  # fmt: skip


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file that `load` reads, in one piece or not at all."""
    buffer = io.BytesIO()  # torch.save to a file would report a full disk as an internal error
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU. Tensors and plain containers only: no code in it is run.

    Raises:
        UserError: no such file, or one that torch.load does not read safely.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        # A Namespace, the flags that training scripts keep beside the weights, is as harmless as a dictionary.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about odd pickles: what matters of them is in the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything; torch's advice on it would not be safe to follow
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, cut off, no checkpoint, or holds more than weights"
        ) from error


def export(path: Path, network: nn.Module, meta: dict[str, Any]) -> None:
    """Write one network, self-describing, in float32; `load_student` reads it."""
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save(path, {"kind": NETWORK, "state_dict": weights, "meta": meta})


def load_student(path: str | Path, arch: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """An exported network, in eval mode on the CPU, and its metadata.

    The metadata: `arch`, `model`, `conv`, `groups`, `pruned_num`, `num_classes` and `build` (further keyword arguments
    of `model.build`); `classes`, `input_size` (C, H, W), `mean` and `std` of the normalization (of pixels in 0 .. 1);
    `accuracy` (top-1 in %), `networks` (accuracy and cost of every network of the run), the run's `config`, and, of a
    refined student, the configs before it in `history`.

    Args:
        arch: the Python file that builds the network, for one that a Python file built: no code runs that only the
            loaded file names.

    Raises:
        UserError (a ValueError): the file is missing, damaged, or no exported network; arch is missing.
    """
    path = Path(path)
    content = load(path)
    if kind_of(content) == CHECKPOINT:
        raise UserError(f"{path} is a training checkpoint, not an exported network: leave out --pruned")
    if kind_of(content) != NETWORK:
        raise UserError(f"{path} is not a network that main.py or finetune.py exported")
    return _restore(path, content["state_dict"], content["meta"], arch)


def best_student(path: Path, arch: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The student of a training checkpoint that was best on the validation set, as `load_student` gives it.

    Raises:
        UserError: the file is missing, damaged, or no training checkpoint of students.
    """
    content = load_checkpoint(path)
    if not content["scores"]:
        raise UserError(f"{path} is of a run's first epoch, before its students were compared: train on with --resume")
    prefix = f"students.{best_of(content['scores'])}."
    weights = {key.removeprefix(prefix): value for key, value in content["model"].items() if key.startswith(prefix)}
    return _restore(path, weights, content["meta"], arch)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint.

    Raises:
        UserError: the file is missing, damaged, or no training checkpoint.
    """
    content = load(path)
    if kind_of(content) == NETWORK:
        raise UserError(f"{path} is an exported network, not a training checkpoint: finetune.py takes it with --pruned")
    if kind_of(content) != CHECKPOINT:
        raise UserError(f"{path} is not a training checkpoint of main.py or finetune.py")
    return content


def best_of(scores: dict[str, dict[str, Any]]) -> int:
    """Index of the student with the highest accuracy; among equals the one with the lowest loss."""
    accuracies, losses = scores["accuracy"]["students"], scores["loss"]["students"]
    return max(range(len(accuracies)), key=lambda i: (accuracies[i], -losses[i]))


def kind_of(content: Any) -> str | None:
    """CHECKPOINT or NETWORK for complete files of this program, None for others."""
    for kind, keys in _KEYS.items():
        if isinstance(content, dict) and content.get("kind") == kind and keys <= content.keys():
            meta = content["meta"]
            return kind if isinstance(meta, dict) and meta.keys() >= _META_KEYS else None
    return None


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must match exactly.

    Raises:
        UserError: it does not; the first missing, unexpected and misshapen keys are named.
    """
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{source} cannot be used: it holds no state dict")
    own = network.state_dict()
    problems = []
    if missing := [key for key in own if key not in weights]:
        problems.append(f"{len(missing)} missing, first {missing[0]}")
    if unexpected := [key for key in weights if key not in own]:
        problems.append(f"{len(unexpected)} unexpected, first {unexpected[0]}")
    for key in own:
        if key in weights and weights[key].shape != own[key].shape:
            problems.append(f"{key} is {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network")
            break
    if problems:
        raise UserError(f"{source} does not match: {'; '.join(problems)}")
    for key, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{source} cannot be used: {key} holds values that are not finite")
    network.load_state_dict(weights)


def _restore(
    path: Path, weights: dict[str, Tensor], meta: dict[str, Any], arch: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    if is_file(str(meta["arch"])):
        if not is_file(arch):
            raise UserError(f"{path} needs the code that built its network: give --arch {meta['arch']}")
        meta = meta | {"arch": arch}
    try:
        specification = {key: meta[key] for key in ("num_classes", "conv", "groups", "pruned_num", "arch")}
        network = build(meta["model"], **specification, **meta.get("build", {}))
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{path} does not say how to build its network: {error}") from error
    load_weights(network, weights, f"{path} as {meta['model']}")
    return network.eval(), meta
