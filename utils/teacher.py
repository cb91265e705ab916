"""The pretrained teacher: a standard network from a file of this program or from a public checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import build, from_public
from utils.checkpoint import CHECKPOINT, NETWORK, kind_of, load, load_weights
from utils.errors import UserError

# Where public training scripts keep the state dict, and what DataParallel puts before its keys.
WRAPPERS = ("state_dict", "model", "net")
PREFIX = "module."


def load_teacher(path: Path, name: str, num_classes: int, device: torch.device) -> nn.Module:
    """The standard network `name` with the weights of `path`, frozen and in eval mode.

    Takes a network exported by `main.py --pretrain`, or a state dict as public projects save it: bare or wrapped, with
    or without `module.`, under the names that its architecture's file knows. Only `num_batches_tracked` may be missing.

    Args:
        path: the file, or a folder that holds it: `[name].pt`, or else its only checkpoint.

    Raises:
        UserError: nothing there, no checkpoint, or one of another architecture, width or class count.
    """
    file = find_file(path, name)
    content = load(file)
    if kind_of(content) == CHECKPOINT:
        raise UserError(f"{file} is a training checkpoint: take the network exported beside it, {name}.pt")
    if kind_of(content) == NETWORK:
        if content["meta"].get("model") != name:
            raise UserError(f"{file} holds a {content['meta'].get('model')}, but --teacher_model is {name}")
        weights, variant = content["state_dict"], {}
    else:
        weights, variant = from_public(name, _state_dict(content, file))
    network = build(name, num_classes, **variant)
    untracked = {key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
    load_weights(network, untracked | weights, f"{file} as {name} with {num_classes} classes")
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def find_file(path: Path, name: str) -> Path:
    """The checkpoint file that `--teacher_dir` means.

    Raises:
        UserError: nothing there, or a folder with none or several to choose from.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"--teacher_dir {path} does not exist: name a checkpoint or a folder that holds one")
        return path
    if (path / f"{name}.pt").is_file():
        return path / f"{name}.pt"
    found = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth", ".th") and file.is_file())
    if not found:
        raise UserError(f"--teacher_dir {path} holds no checkpoint (.pt, .pth or .th): name the file itself")
    if len(found) > 1:
        raise UserError(f"--teacher_dir {path} holds {_listed(file.name for file in found)}: name one of them")
    return found[0]


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a public checkpoint, out of their wrapping."""
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())
    if not tensors or not all(isinstance(key, str) for key in content):
        raise UserError(f"{file} holds no state dict, neither bare nor under {_listed(WRAPPERS)}")
    return {key.removeprefix(PREFIX): value for key, value in content.items()}


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
