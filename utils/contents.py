"""What the files of this program hold, checked once, when a file is read: readers rely on every part of it."""

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from utils import normalization
from utils.methods import METHODS

CHECKPOINT, NETWORK = "training checkpoint", "exported network"
PARTS, DEPTH = 1_000_000, 20  # more than any file of this program has
NOT_IN_PATHS = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # the surrogates between stand for bytes that are not UTF-8

Schema = Callable[[Any], bool] | dict[str, "Schema"]
"""What a value must satisfy; of a dictionary, each of its parts, of which those with a ? may be missing."""


def kind_of(content: Any) -> str | None:
    """CHECKPOINT or NETWORK for a file of this program, None for others."""
    kind = content.get("kind") if isinstance(content, dict) else None
    return next((known for known in SCHEMAS if kind == known), None)


def find_fault(content: dict[str, Any]) -> str | None:
    """The first part of a file of this program that is missing or malformed, as in "meta.mean"; None if there is none.

    What it lets pass can be computed with, written as JSON and compared; it does not say that the weights fit.
    """
    if fault := _mismatch(content, SCHEMAS[content["kind"]], ""):
        return fault
    meta = content["meta"]
    if not _is_plain(meta):
        return "meta"
    if len(meta["classes"]) != meta["num_classes"]:
        return "meta.num_classes"
    if not normalization.is_plausible(meta["mean"], meta["std"]):
        return "meta.mean or meta.std"
    if "ensemble" in meta:
        students = {key.split(".")[2] for key in content.get("state_dict", {}) if key.startswith("learner.students.")}
        if len(students) != meta["ensemble"]["num_students"]:
            return "meta.ensemble"
    if content["kind"] == CHECKPOINT:
        students = len({key.split(".")[1] for key in content["model"] if key.startswith("students.")})
        scores = (content["scores"] or {}).values()
        if any(len(part["students"]) != students for part in scores if isinstance(part, dict)):
            return "scores"
        if meta["config"]["num_students"] != students:
            return "meta.config.num_students"
        if content["best"] and content["best"]["student"] >= students:
            return "best.student"
    return None


def is_state_dict(value: Any) -> bool:
    """Whether it is a dictionary of dense tensors by name, each with memory of its own for all of its numbers."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and len(key) <= 1000 and _is_dense(tensor) for key, tensor in value.items())
    )


def _mismatch(value: Any, schema: Schema, name: str) -> str | None:
    """The name of the first part of `value` that is not as `schema` says."""
    if not isinstance(schema, dict):
        return None if schema(value) else name
    if not isinstance(value, dict):
        return name
    for key, part in schema.items():
        required, key = not key.endswith("?"), key.removesuffix("?")
        inner = f"{name}.{key}".lstrip(".")
        fault = _mismatch(value[key], part, inner) if key in value else inner if required else None
        if fault:
            return fault
    return None


def _is_text(value: Any) -> bool:
    """Of a length and of characters that a path may have."""
    return isinstance(value, str) and len(value) <= 4096 and not NOT_IN_PATHS.search(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_dense(value: Any) -> bool:
    """A strided tensor on the CPU that is no larger than its memory: none that repeats a number without end."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _as(schema: Schema) -> Callable[[Any], bool]:
    return lambda value: _mismatch(value, schema, "part") is None


def _list_of(part: Schema, length: int | None = None) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        is_list = isinstance(value, list | tuple) and length in (None, len(value))
        return is_list and all(_mismatch(entry, part, "entry") is None for entry in value)

    return check


def _is_momentum(value: Any) -> bool:
    """What SGD remembers: {index: {"momentum_buffer": tensor or None}}."""
    return isinstance(value, dict) and all(
        _is_count(index) and isinstance(state, dict) and _optional(_is_dense)(state.get("momentum_buffer"))
        for index, state in value.items()
    )


def _is_plain(value: Any) -> bool:
    """Whether JSON can say it. It ends for cycles and for parts that are used over and over, too."""
    stack, parts = [(value, 0)], 0
    while stack:
        part, depth = stack.pop()
        parts += 1
        if parts > PARTS or depth > DEPTH:
            return False
        if isinstance(part, dict):
            if not all(isinstance(key, str) for key in part):
                return False
            stack.extend((entry, depth + 1) for entry in part.values())
        elif isinstance(part, list | tuple):
            if len(part) > PARTS:
                return False
            stack.extend((entry, depth + 1) for entry in part)
        elif not (part is None or isinstance(part, bool | str) or _is_number(part)):
            return False
    return True


_BEST = {"epoch": _is_count, "student": _is_count, "accuracy": _is_number, "loss": _is_number}
_PROGRESS = {
    "position": _is_count,
    "random": lambda states: isinstance(states, dict) and all(map(_is_dense, states.values())) and "cpu" in states,
    "names": _list_of(_is_text),
    "losses": lambda losses: _is_dense(losses) and losses.dim() == 2,
    "sizes": lambda sizes: _is_dense(sizes) and sizes.dim() == 1,
    "correct": lambda correct: _is_dense(correct) and correct.dim() == 1,
}
_BY_NETWORK = {"students": _list_of(_is_number), "online_teacher?": _is_number}
_SCORES = {"accuracy": _BY_NETWORK, "loss": _BY_NETWORK, "top5?": _BY_NETWORK, "disagreement?": _is_number}
_ACCURACIES = {"val": _optional(_is_number), "test": _optional(_is_number)}
_CONFIG = {
    "dataset": _is_text,
    "data_dir": _optional(_is_text),
    "image_size?": _optional(_is_count),
    "train_size?": _optional(_is_number),
    "val_size": _is_number,
    "teacher_model": _is_text,
}
# What main.py --test_only takes from a training checkpoint, too.
_TRAINED = {
    "student_model": _optional(_is_text),
    "num_students": _is_count,
    "lambda": _is_number,
    "pretrain": lambda value: isinstance(value, bool),
    "method?": lambda value: isinstance(value, str) and value in METHODS,
    "teacher_norm?": _optional(_is_text),
}
_IMAGES = {"count": _is_count, "sha256": _is_text}
_INPUTS = {"train?": _IMAGES, "val?": _IMAGES, "test?": _IMAGES, "teacher?": _is_text, "refined?": _is_text}
_META = {
    "arch": _is_text,
    "model": _is_text,
    "conv": _optional(_is_text),
    "groups": _optional(_is_count),
    "pruned_num": _is_count,
    "build?": _is_dict,
    "num_classes": _is_count,
    "classes": _list_of(lambda name: isinstance(name, str)),
    "input_size": _list_of(_is_count, 3),
    "mean": _list_of(_is_number, 3),
    "std": _list_of(_is_number, 3),
    "networks?": _list_of({"name": _is_text, "params": _is_number, "macs": _is_number} | _ACCURACIES),
    "history?": _list_of(_is_dict),
    "ensemble?": {"method": _is_text, "num_students": _is_count},
    "preprocessing?": _is_dict,
    "inputs?": _INPUTS,
    "config": _CONFIG,
}
SCHEMAS = {
    NETWORK: {"state_dict": is_state_dict, "meta": _META},
    CHECKPOINT: {
        "epoch": _is_count,
        "model": is_state_dict,
        "optimizer": {"state": _is_momentum},
        "scores": _optional(_as(_SCORES)),  # None: its first epoch is not done
        "best": _optional(_as(_BEST)),
        "progress?": _optional(_as(_PROGRESS)),
        "seconds?": _is_number,
        "environment?": _is_plain,
        "meta": _META | {"config": _CONFIG | _TRAINED},
    },
}
