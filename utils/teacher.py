"""The pretrained teacher: a standard network from an exported file or a published checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.loader import Batches
from data.sources import DataSet, first_difference
from model import architecture_of, build, published, variant_for
from model.convert import add_noise, inherit, not_inherited
from model.reconstruct import reconstruct
from model.weights import place
from utils.checkpoint import ExportedNetwork, Meta, TrainingCheckpoint, load, restore
from utils.config import Config
from utils.cost import check_fits
from utils.errors import UserError
from utils.metrics import Accuracy, accuracy
from utils.normalization import MeanStd, describe, parse

PUBLIC = (
    "the pretrained teacher is a public checkpoint, as a rule trained on all training images, those of the validation "
    "set among them: its accuracy there is no measure"
)
NOISE = 0.3  # of each kernel's standard deviation, in students that start from a teacher's weights


class Renormalized(nn.Module):
    """Converts images to the normalization that a network was trained with: (B, 3, H, W) -> (B, K)."""

    def __init__(self, network: nn.Module, given: MeanStd, wanted: MeanStd):
        super().__init__()
        self.network, self.normalization = network, wanted
        (mean, std), (wanted_mean, wanted_std) = (torch.tensor(norm)[..., None, None] for norm in (given, wanted))
        self.register_buffer("scale", std / wanted_std)
        self.register_buffer("bias", (mean - wanted_mean) / wanted_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * self.scale + self.bias)


class Reordered(nn.Module):
    """Puts a network's logits into the order of the data's classes: (B, 3, H, W) -> (B, K)."""

    def __init__(self, network: nn.Module, order: Sequence[int]):
        super().__init__()
        self.network = network
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, self.order]


def pretrained_teacher(config: Config, dataset: DataSet, device: torch.device) -> tuple[nn.Module | None, list[str]]:
    """Load the pretrained teacher of --teacher_dir for the normalization and the classes of a data set.

    Returns:
        The teacher, None without --teacher_dir; and remarks for the log.

    Raises:
        UserError: as `load_teacher`; it does not take such images, it was trained on the validation images, or it has
            other classes and there is no --force.
    """
    if not config.teacher_dir:
        return None, []
    name, size, num_classes = config.teacher_model, dataset.input_size, len(dataset.classes)
    file, given = find_file(config.teacher_dir, name), (dataset.mean, dataset.std)
    teacher, meta, remark = load_teacher(file, name, num_classes, device, config.arch, size, given, config.teacher_norm)
    check_fits(teacher, name, size, num_classes)
    if meta is None:
        return teacher, [remark] if dataset.val is dataset.test else [remark, PUBLIC]
    check_unseen(meta, dataset, config, file)
    difference = first_difference(meta.classes, dataset.classes)
    if difference and sorted(meta.classes) == sorted(dataset.classes):
        teacher = Reordered(teacher, [meta.classes.index(label) for label in dataset.classes]).to(device).eval()
        reordered = f"the pretrained teacher's logits are put into the order of the data's classes: {difference}"
        return teacher, [remark, reordered]
    if difference and not config.force:
        raise UserError(
            f"{file} knows other classes than {dataset.name} has ({difference}): take another teacher, or --force to "
            "match them by their order"
        )
    return teacher, [remark]


def check_unseen(meta: Meta, dataset: DataSet, config: Config, source: Path) -> None:
    """Raise a UserError if a run would validate on images that the network in `source` was trained on."""
    if config.test_only or dataset.val is dataset.test or _is_recorded(meta, "val", dataset, config):
        return
    then, same_test = meta.config["val_size"], _is_recorded(meta, "test", dataset, config)
    if then != config.val_size and (same_test or _has_same_name(meta, config)):
        raise UserError(
            f"--val_size {config.val_size:g}, but {source} was trained with {then:g}: it would be validated on images "
            f"that it was trained on; give --val_size {then:g}"
        )
    if same_test and meta.inputs.val:
        raise UserError(
            f"{source} was trained with other validation images of the same data: it would be validated on images that "
            "it was trained on; give the images that it was trained with, or --val_size 0"
        )


def _is_recorded(meta: Meta, split: str, dataset: DataSet, config: Config) -> bool:
    """Whether the validation ("val") or test images recorded in a network's file are those of `dataset`."""
    recorded = getattr(meta.inputs, split, None)
    return recorded is not None and recorded == getattr(dataset, split).fingerprint(config.data_dir)


def _has_same_name(meta: Meta, config: Config) -> bool:
    """Whether a network was trained on the data set of this name or folder.

    Fingerprints may differ although the images are the same: those of images that stream and of images in memory do.
    """
    then = meta.config
    if meta.inputs and config.dataset == "folder" and then["data_dir"]:
        return then["dataset"] == "folder" and Path(then["data_dir"]).resolve() == config.data_dir.resolve()
    return then["dataset"] == config.dataset


def with_normalization_of(teacher: nn.Module, dataset: DataSet) -> tuple[DataSet, nn.Module]:
    """Normalize the data set as the teacher was trained, and unwrap the teacher, whose weights students can then take.

    Raises:
        UserError: its classes are in another order than those of the data.
    """
    if isinstance(teacher, Reordered):
        raise UserError("--init teacher needs a teacher whose classes are in the order of the data's classes")
    if isinstance(teacher, Renormalized):
        mean, std = teacher.normalization
        return replace(dataset, mean=mean, std=std), teacher.network
    return dataset, teacher


def start_from(teacher: nn.Module, students: Sequence[nn.Module], images: Sequence[Tensor], val: Batches) -> str:
    """Start the students from the teacher's weights, and describe it for log and report.

    The first one inherits (`model.convert.inherit`) and is fitted to the teacher's outputs (`reconstruct`). The others
    get the same weights with noise, because equal students would learn nothing from one another.

    Args:
        images: batches of training images.
        val: validation images, for the accuracies before training.

    Raises:
        UserError: the teacher is not the standard network of the students.
    """
    first = students[0].to(images[0].device)
    kept = inherit(first, teacher)
    inherited = accuracy(first, val)
    reconstruct(first, teacher, images)
    for student in students[1:]:
        student.load_state_dict(first.state_dict())
        add_noise(student, NOISE)
    text = (
        f"from the weights of the pretrained teacher, with {kept:.1%} of the energy of the replaced convolutions and "
        f"{inherited} on the validation set; fitted to the outputs of the teacher on {sum(map(len, images)):,} "
        f"training images: {accuracy(first, val)}"
    )
    if len(students) > 1:
        text += f"; all but the first with noise of {NOISE:g} standard deviations of each kernel"
    if missing := not_inherited(first, teacher):
        text += f"; random, for the teacher has no such weights: {', '.join(missing)}"
    return text


def check_accuracy(teacher: nn.Module, val: Batches, targets: np.ndarray, force: bool) -> Accuracy:
    """The teacher's accuracy on the validation images, whose classes are `targets`.

    Raises:
        UserError: its logits are not finite; or it is hardly better than always answering the most frequent class, and
            there is no `force`.
    """
    found, chance = accuracy(teacher, val), 100 * np.bincount(targets).max() / len(targets)
    if math.isnan(found.top1):
        raise UserError("the logits of the pretrained teacher are not finite on the validation set: it cannot teach")
    if found.top1 < chance + 0.05 * (100 - chance) and not force:
        raise UserError(
            f"the pretrained teacher has {found.top1:.2f} % right on the validation set, where guessing has "
            f"{chance:.2f} %: its classes may be in another order, it may have been trained on other data, or with "
            "another normalization (--teacher_norm); --force trains with it all the same"
        )
    return found


def load_teacher(
    path: Path,
    name: str,
    num_classes: int,
    device: torch.device,
    arch: str | None = None,
    input_size: Sequence[int] | None = None,
    given: MeanStd | None = None,
    norm: str | None = None,
) -> tuple[nn.Module, Meta | None, str]:
    """Load the standard network `name`, frozen and in eval mode.

    Args:
        path: an exported network or a published state dict (model/published.py), or a folder, see `find_file`.
        arch: as --arch; by default the one that has `name`.
        input_size: (C, H, W) of the images, for the form of a published network; by default that of `model.build`.
        given: normalization of the images that it will see.
        norm: normalization that it was trained with, as --teacher_norm; by default that of the file or its project, or
            else `given`.

    Returns:
        The network; the metadata of an exported one; and a remark on the layout of the file and the normalization.

    Raises:
        UserError: no such file, no checkpoint, or one of another architecture, width or number of classes.
    """
    file, arch, meta = find_file(path, name), architecture_of(name, arch), None
    content = load(file)
    if isinstance(content, TrainingCheckpoint):
        raise UserError(f"{file} is a training checkpoint: take the network exported beside it, {name}.pt")
    if isinstance(content, ExportedNetwork):
        meta = content.meta
        if meta.model != name:
            raise UserError(f"{file} holds a {meta.model}, but --teacher_model is {name}")
        if meta.num_classes != num_classes:
            raise UserError(f"{file} knows {meta.num_classes} classes, the data has {num_classes}")
        network, _ = restore(file, content, arch)
        wanted, layout = (tuple(meta.mean), tuple(meta.std)), "exported by this program"
    else:
        variant = variant_for(arch, name, input_size) if input_size else {}
        builder = partial(build, name, num_classes, arch=arch, **variant)
        source = f"{file} as {name} with {num_classes} classes"
        network, wanted, layout = published.load(content, arch, name, builder, source)
    remark = f"{file}: {layout}; normalization of the teacher: "
    if norm:
        wanted = parse(norm)
        remark += f"{describe(wanted)} (--teacher_norm)"
    else:
        remark += describe(wanted) if wanted else "that of the students, since none is known (--teacher_norm sets it)"
    if given and wanted and not np.allclose(given, wanted):
        network = Renormalized(network, given, wanted)
    return place(network, device).eval().requires_grad_(False), meta, remark


def find_file(path: Path, name: str) -> Path:
    """The checkpoint file of --teacher_dir: `path` itself, or in a folder `[name].pt` or else the only checkpoint.

    Raises:
        UserError: nothing there, or a folder with no checkpoint or several.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"--teacher_dir {path} does not exist: name a checkpoint or a folder that holds one")
        return path
    if (path / f"{name}.pt").is_file():
        return path / f"{name}.pt"
    named = (file for file in path.iterdir() if file.name.endswith(published.SUFFIXES) and file.name[0] != ".")
    found = sorted(file for file in named if file.is_file())
    if not found:
        suffixes = ", ".join(published.SUFFIXES)
        raise UserError(f"--teacher_dir {path} holds no checkpoint ({suffixes}): name the file itself")
    if len(found) > 1:
        rest = f", {len(found) - 2:,} more" if len(found) > 2 else ""
        raise UserError(f"--teacher_dir {path} holds {found[0].name}, {found[1].name}{rest}: name one of them")
    return found[0]
