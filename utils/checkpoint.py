"""Files of weights: training checkpoints, exported networks, and reading either without running any code in it.

A training checkpoint holds everything to go on from: all students, the online teacher, the optimizer, the best so far.
An exported network is one network alone. Both carry the same `meta`, which says how to build the network and what it
was trained on, so that a file needs nothing beside it. Plain dictionaries of tensors, numbers and strings.
"""

import argparse
import io
import mmap
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.sources import DataSet
from model import build, check_architecture
from model.external import is_file
from model.online import Ensemble
from model.weights import build_with, check_match
from utils import inputs
from utils.config import as_typed, changed_flag, completed
from utils.contents import CHECKPOINT, NETWORK, find_fault, kind_of
from utils.errors import UserError
from utils.files import atomic_write
from utils.methods import METHODS
from utils.metrics import Best, Scores


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file that `load` reads, in one piece or not at all."""
    with atomic_write(path) as file:
        file.write(_packed(content))


def load(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU. Tensors and plain containers only: no code in it is run.

    Raises:
        UserError: no such file, one that is damaged or that torch.load does not read safely, or a file of this program
            without all that belongs in it.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        _check_file(path)
        # A Namespace, the flags that training scripts keep beside the weights, is as harmless as a dictionary.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about odd pickles: what matters of them is in the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything; torch's advice on it would not be safe to follow
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, cut off, no checkpoint, or holds more than weights"
        ) from error
    if kind_of(content) and (fault := find_fault(content)):
        raise UserError(f"{path} is no whole {kind_of(content)}: {fault} is missing or malformed")
    if kind_of(content):
        content["meta"]["config"] = completed(content["meta"]["config"])
    return content


def _check_file(path: Path) -> None:
    """What torch.load leaves out: the checksums of an archive, how much it unpacks to, and bytearrays of any length.

    Raises:
        Exception: it is damaged, or made to exhaust the memory.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:
            raise ValueError("a bytearray, which no file of weights needs")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_size != entry.file_size for entry in archive.infolist()) or archive.testzip():
                raise ValueError("another archive than torch.save writes, or a damaged one")


def export(path: Path, network: nn.Module, meta: dict[str, Any]) -> None:
    """Write one network, self-describing, in float32; `load_student` reads it."""
    save(path, _exported(network, meta))


def exported_size(network: nn.Module, meta: dict[str, Any]) -> int:
    """Bytes of the file that `export` would write."""
    return len(_packed(_exported(network, meta)))


def load_student(path: str | Path, arch: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """An exported network, in eval mode on the CPU, and its metadata.

    The metadata: `arch`, `model`, `conv`, `groups`, `pruned_num`, `num_classes` and `build` (further keyword arguments
    of `model.build`); `classes`, `input_size` (C, H, W), `mean` and `std` of the normalization (of pixels in 0 .. 1),
    `preprocessing` from file to pixels (`data.sources.Preprocessing`; older files lack it);
    `accuracy` (top-1 in %), `networks` (accuracy and cost of every network of the run), the run's `config`, and, of a
    refined student, the configs before it in `history`. A file of --export_teacher gives the online teacher as one
    network; its metadata also has `ensemble`, the `method` that made it and its `num_students`.

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
    return _student(path, content, Best.of(content["epoch"], Scores.from_plain(content["scores"])).student, arch)


def all_students(path: Path, content: dict[str, Any], arch: str | None = None) -> list[nn.Module]:
    """The students of a training checkpoint, in eval mode; raises as `best_student` does."""
    return [_student(path, content, i, arch)[0] for i in range(content["meta"]["config"]["num_students"])]


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


def load_to_resume(path: Path, meta: dict[str, Any], force: bool) -> dict[str, Any]:
    """A training checkpoint to go on from, with the model_best.pt beside it.

    Args:
        meta: of the run that goes on.
        force: accept other images, another teacher, or another student to refine.

    Raises:
        UserError: they cannot be read or do not belong together, or the run had other flags, inputs or more epochs.
    """
    content = load_checkpoint(path)
    was = content["meta"]
    if name := changed_flag(was["config"], meta["config"]):
        before, now = (as_typed(name, config.get(name)) for config in (was["config"], meta["config"]))
        raise UserError(f"{path} was trained {before}, not {now}: resume it {before}")
    if not force:
        inputs.check_same(was.get("inputs", {}), meta.get("inputs", {}), path)
    if any(was[key] != meta[key] for key in ("classes", *(() if force else ("mean", "std")))):
        raise UserError(f"{path} was trained on other data: resume it with the same --data_dir")
    begun = content["epoch"] + bool(content.get("progress") and len(content["progress"]["sizes"]))
    if content["best"]:
        path_of_best = path.with_name("model_best.pt")
        best_epoch = load_checkpoint(path_of_best)["epoch"]
        # A run that was killed between its two writes left the best of the next epoch, which comes again.
        if best_epoch not in (content["best"]["epoch"], content["epoch"] + 1):
            raise UserError(f"{path_of_best} is of another epoch than the best one of {path}: resume from last.pt")
        begun = max(begun, best_epoch)
    if begun > meta["config"]["num_epochs"]:
        raise UserError(
            f"{path} is of epoch {begun} already: give --num_epochs {begun} or more, or start over with --reset"
        )
    return content


def with_code(path: Path, meta: dict[str, Any], arch: str | None) -> dict[str, Any]:
    """The metadata of a file, with the Python file `arch` in place of one that it names, whose code is not to be run.

    Raises:
        UserError: it names one, and `arch` is none.
    """
    if not is_file(meta["arch"]):
        return meta
    if not is_file(arch):
        raise UserError(f"{path} needs the code that built its network: give --arch {meta['arch']}")
    return meta | {"arch": arch}


def as_trained(dataset: DataSet, meta: dict[str, Any], source: Path) -> DataSet:
    """The data set, normalized as the network in `source` was trained.

    Raises:
        UserError: the network knows other classes.
    """
    if difference := first_difference(meta["classes"], dataset.classes):
        raise UserError(
            f"{source} knows other classes than {dataset.name} has ({difference}): give the data it was trained on"
        )
    return replace(dataset, mean=tuple(meta["mean"]), std=tuple(meta["std"]))


def first_difference(known: Sequence[str], given: Sequence[str]) -> str | None:
    """For messages: the first class that a network and the data do not have in common, by its place."""
    for i, (a, b) in enumerate(zip_longest(known, given)):
        if a != b:
            names = ("none" if name is None else f"'{name}'" for name in (a, b))
            return "class {} is {} there and {} in the data".format(i, *names)
    return None


def load_momentum(optimizer: torch.optim.SGD, content: dict[str, Any], source: str) -> None:
    """Restore what SGD remembers of the parameters; its settings stay those of the flags.

    Raises:
        UserError: it is of other parameters.
    """
    state = content["state"].items()
    buffers = {str(i): entry["momentum_buffer"] for i, entry in state if entry.get("momentum_buffer") is not None}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    check_match({str(i): own[i] for i in range(len(own)) if str(i) in buffers}, buffers, f"{source}: momentum")
    if buffers:  # zeros for the others, which no gradient has reached so far
        state = {i: {"momentum_buffer": buffers.get(str(i), torch.zeros_like(own[i]))} for i in range(len(own))}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _packed(content: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()  # torch.save to a file would report a full disk as an internal error
    torch.save(content, buffer)
    return buffer.getbuffer()


def _exported(network: nn.Module, meta: dict[str, Any]) -> dict[str, Any]:
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return {"kind": NETWORK, "state_dict": weights, "meta": meta}


def _student(path: Path, content: dict[str, Any], index: int, arch: str | None) -> tuple[nn.Module, dict[str, Any]]:
    prefix = f"students.{index}."
    weights = {key.removeprefix(prefix): value for key, value in content["model"].items() if key.startswith(prefix)}
    return _restore(path, weights, content["meta"], arch)


def _restore(
    path: Path, weights: dict[str, Tensor], meta: dict[str, Any], arch: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    meta = with_code(path, meta, arch)
    ensemble = meta.get("ensemble")
    count = ensemble["num_students"] if ensemble else 1
    specification = {key: meta[key] for key in ("num_classes", "conv", "groups", "pruned_num", "arch")}

    def builder() -> nn.Module:
        try:
            check_architecture(meta["arch"], meta["model"])
            networks = [build(meta["model"], **specification, **meta.get("build", {})) for _ in range(count)]
            if not ensemble:
                return networks[0]
            return Ensemble(METHODS[ensemble["method"]].online_teacher(networks, meta["num_classes"]))
        except Exception as error:  # whatever is wrong with what the file says
            raise UserError(f"{path} does not say how to build its network: {error}") from error

    return build_with(weights, builder, f"{path} as {meta['model']}").eval(), meta
