"""Files of weights: training checkpoints and exported networks, read without running any code in them.

A training checkpoint holds everything that a run needs to continue: all students, the online teacher, the optimizer,
the best epoch so far. An exported network is a single network. Both carry a `Meta`, which says how to build the network
and what it was trained on, so that a file needs nothing beside it. On disk, the classes below are plain dictionaries of
tensors, numbers and strings.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from data.sources import DataSet, Fingerprint
from model import build, check_architecture
from model.external import is_file
from model.online import Ensemble
from model.weights import build_with, fingerprint, read_weights
from utils import normalization
from utils.errors import UserError
from utils.files import atomic_write, from_plain, is_plain, to_plain
from utils.methods import METHODS
from utils.metrics import Best, Scores
from utils.options import as_typed, changed_flag, completed

# The flags in a recorded configuration that readers use.
RecordedConfig = TypedDict("RecordedConfig", {
    "dataset": str, "data_dir": str | None, "labels": str | None, "image_size": int | None,
    "train_size": float | None, "val_size": float,
    "teacher_model": str, "teacher_norm": str | None, "student_model": str | None, "num_students": int,
    "method": str, "lambda": float, "pretrain": bool,
})  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Fingerprints of the inputs of a run; None if not used, or not recorded by an older version."""

    train: Fingerprint | None = None
    val: Fingerprint | None = None
    test: Fingerprint | None = None
    teacher: str | None = None
    refined: str | None = None

    @classmethod
    def of(
        cls, dataset: DataSet, data_dir: Path | None, teacher: nn.Module | None, refined: nn.Module | None = None
    ) -> "Inputs":
        networks = {"teacher": teacher and fingerprint(teacher), "refined": refined and fingerprint(refined)}
        return cls(**dataset.fingerprints(data_dir), **networks)

    def check_same(self, now: "Inputs", source: Path) -> None:
        """Raise a UserError if the run of the checkpoint `source` had other inputs than the run that resumes it."""
        titles = {"train": "training images", "val": "validation images", "test": "test images"}
        titles |= {"teacher": "weights of the pretrained teacher", "refined": "weights of the student to refine"}
        for name, title in titles.items():
            was, given = getattr(self, name), getattr(now, name)
            if was and given and was != given:
                if isinstance(was, Fingerprint) and was.count != given.count:
                    title += f" ({was.count:,}, now {given.count:,})"
                raise UserError(f"{source} was trained with other {title}: give the same, or go on with --force")


@dataclass(frozen=True)
class Meta:
    """How to build a network and what it was trained on.

    Attributes:
        arch, model, conv, groups, pruned_num, num_classes: arguments of `model.build`; `build` has further ones.
        classes: names, in the order of the logits.
        input_size: (C, H, W).
        mean, std: normalization of each channel of pixels in 0 .. 1.
        config: the recorded configuration of the run.
        preprocessing: `data.sources.Preprocessing` from file to pixels; older files lack it.
        rule: as in `model.convert.cheapen`; files before rule 2 do not state it.
        budget: the students that --pruned_num auto compared, as `utils.cost.Candidates.curve` lists them.
        start: the weights from which training started, in words.
        accuracy: top-1 in % of an exported network, by split.
        networks: accuracy and cost of every network of the run.
        history: configurations of the runs before, for a refined student.
        ensemble: method and num_students of an online teacher that was exported as one network.
    """

    arch: str
    model: str
    conv: str | None
    groups: int | None
    pruned_num: int
    num_classes: int
    classes: list[str]
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    config: RecordedConfig
    build: dict[str, Any] | None = None
    rule: int | None = None
    start: str | None = None
    budget: list[list[float]] | None = None
    preprocessing: dict[str, Any] | None = None
    inputs: Inputs | None = None
    accuracy: dict[str, Any] | None = None
    networks: list[dict[str, Any]] | None = None
    history: list[dict[str, Any]] | None = None
    ensemble: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExportedNetwork:
    state_dict: dict[str, Tensor]
    meta: Meta
    kind: str = "exported network"

    @classmethod
    def of(cls, network: nn.Module, meta: Meta) -> "ExportedNetwork":
        return cls({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, meta)


@dataclass(frozen=True)
class Progress:
    """The steps done of an interrupted epoch.

    Attributes:
        position: batches that were taken from the loader.
        random: states of the random generators, by device type.
        names, losses, sizes, correct: state of `metrics.EpochMeans`.
    """

    position: int
    random: dict[str, Tensor]
    names: list[str]
    losses: Tensor
    sizes: Tensor
    correct: Tensor


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A run after `epoch` epochs; `scores` are of the last one on the validation set, None before the first."""

    epoch: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scores: Scores | None
    best: Best | None
    meta: Meta
    progress: Progress | None
    seconds: float | None = None
    environment: dict[str, Any] | None = None
    kind: str = "training checkpoint"

    def student(self, index: int) -> ExportedNetwork:
        """A student alone."""
        prefix = f"students.{index}."
        weights = {key.removeprefix(prefix): value for key, value in self.model.items() if key.startswith(prefix)}
        return ExportedNetwork(weights, self.meta)


# The kinds of files, and for messages: what to do with one in the place of the other.
KINDS = {
    TrainingCheckpoint: "a training checkpoint: leave out --pruned",
    ExportedNetwork: "an exported network: finetune.py takes it with --pruned",
}


def _is_consistent(record: TrainingCheckpoint | ExportedNetwork) -> bool:
    """Whether the parts of a file belong together, as in every file of this program."""
    meta = record.meta
    facts = [len(meta.classes) == meta.num_classes, meta.config["method"] in METHODS]
    facts.append(normalization.is_plausible(meta.mean, meta.std))
    if isinstance(record, TrainingCheckpoint):
        students, scores, progress = _count_students(record.model, "students."), record.scores, record.progress
        facts.append(0 < students == meta.config["num_students"])
        for values in (scores.accuracy, scores.loss, scores.top5) if scores else ():
            facts.append(values is None or len(values.students) == students)
        facts.append(record.best is None or record.best.student < students)
        if progress:
            facts.append(_is_random_state(progress.random.get("cpu")))
            facts.append((progress.losses.dim(), progress.sizes.dim(), progress.correct.dim()) == (2, 1, 1))
    return all(facts)


def _is_random_state(value: Tensor | None) -> bool:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _count_students(weights: dict[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})


def save(path: Path, record: Any) -> None:
    """Write a `TrainingCheckpoint` or an `ExportedNetwork`, completely or not at all."""
    with atomic_write(path) as file:
        file.write(_packed(record))


def load(path: Path, expected: type | None = None) -> Any:
    """Load a file of weights on the CPU, without running code in it.

    Args:
        expected: one of KINDS, to refuse all other files.

    Returns:
        A `TrainingCheckpoint`, an `ExportedNetwork`, or the content of any other file.

    Raises:
        UserError: the file cannot be read (`read_weights`), is of another kind, or is incomplete.
    """
    content = read_weights(path)
    name = content.get("kind") if isinstance(content, dict) else None
    kind = next((kind for kind in KINDS if name == kind.kind), None)
    if expected not in (None, kind):
        found = f"but {KINDS[kind]}" if kind else "of main.py or finetune.py"
        raise UserError(f"{path} is no {expected.kind} {found}")
    if kind is None:
        return content
    try:
        for name in ("meta", "environment"):
            if not is_plain(content.get(name)):
                raise ValueError(name)
        meta = content.get("meta")
        if isinstance(meta, dict) and isinstance(meta.get("config"), dict):
            content["meta"] = meta | {"config": completed(meta["config"])}
        record = from_plain(kind, {"progress": None} | content)  # older checkpoints lack it
        if not _is_consistent(record):
            raise ValueError("a part of it")
    except ValueError as error:
        raise UserError(f"{path} is no whole {kind.kind}: {error} is missing or malformed") from error
    return record


def export(path: Path, network: nn.Module, meta: Meta) -> None:
    """Write one network, self-describing, in float32; `load_student` reads it."""
    save(path, ExportedNetwork.of(network, meta))


def exported_size(network: nn.Module, meta: Meta) -> int:
    """Size in bytes of the file that `export` would write."""
    return len(_packed(ExportedNetwork.of(network, meta)))


def load_student(path: str | Path, arch: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load an exported network, in eval mode on the CPU, and its `Meta` as a plain dictionary.

    A file of --export_teacher gives the online teacher as one network.

    Args:
        arch: the Python file that defines the network, for one that needs such a file. The file that the metadata name
            is not run.

    Raises:
        UserError (a ValueError): the file is missing, damaged, or no exported network; arch is missing.
    """
    network, meta = load_network(Path(path), arch)
    return network, to_plain(meta)


def load_network(path: Path, arch: str | None = None) -> tuple[nn.Module, Meta]:
    """As `load_student`, with typed metadata."""
    return restore(path, load(path, ExportedNetwork), arch)


def best_student(path: Path, arch: str | None = None) -> tuple[nn.Module, Meta]:
    """As `load_network`, the student of a training checkpoint that is best on the validation set."""
    content = load(path, TrainingCheckpoint)
    if not content.scores:
        raise UserError(f"{path} is of a run's first epoch, before its students were compared: train on with --resume")
    config = content.meta.config
    best = Best.of(content.epoch, content.scores, METHODS[config["method"]].candidates(config["num_students"])).student
    return restore(path, content.student(best), arch)


def all_students(path: Path, content: TrainingCheckpoint, arch: str | None = None) -> tuple[list[nn.Module], Meta]:
    """As `best_student`, but all students of a training checkpoint that is already loaded."""
    count = content.meta.config["num_students"]
    networks, metas = zip(*(restore(path, content.student(i), arch) for i in range(count)), strict=True)
    return list(networks), metas[0]


def load_to_resume(path: Path, meta: Meta, force: bool) -> TrainingCheckpoint:
    """Load a training checkpoint to resume, and check it and the model_best.pt beside it.

    Args:
        meta: metadata of the run that resumes it.
        force: accept other images, another teacher, or another student to refine.

    Raises:
        UserError: a file is damaged, they do not belong together, or the run had other flags, inputs or more epochs.
    """
    content = load(path, TrainingCheckpoint)
    was = content.meta
    if name := changed_flag(was.config, meta.config):
        before, now = (as_typed(name, config.get(name)) for config in (was.config, meta.config))
        raise UserError(f"{path} was trained {before}, not {now}: resume it {before}")
    if not force and was.inputs and meta.inputs:
        was.inputs.check_same(meta.inputs, path)
    if was.classes != meta.classes or (not force and (was.mean, was.std) != (meta.mean, meta.std)):
        raise UserError(f"{path} was trained on other data: resume it with the same --data_dir")
    begun = content.epoch + bool(content.progress and len(content.progress.sizes))
    if content.best:
        path_of_best = path.with_name("model_best.pt")
        best_epoch = load(path_of_best, TrainingCheckpoint).epoch
        # A run killed between its two writes leaves the best of the next epoch, which is trained again.
        if best_epoch not in (content.best.epoch, content.epoch + 1):
            raise UserError(f"{path_of_best} is of another epoch than the best one of {path}: resume from last.pt")
        begun = max(begun, best_epoch)
    if begun > meta.config["num_epochs"]:
        raise UserError(
            f"{path} is of epoch {begun} already: give --num_epochs {begun} or more, or start over with --reset"
        )
    return content


def _packed(record: Any) -> memoryview:
    buffer = io.BytesIO()  # torch.save to a file would report a full disk as an internal error
    torch.save(to_plain(record), buffer)
    return buffer.getbuffer()


def restore(path: Path, content: ExportedNetwork, arch: str | None) -> tuple[nn.Module, Meta]:
    """Build the network that the content of `path` describes, in eval mode; raises as `load_student` does."""
    meta = content.meta
    if is_file(meta.arch):  # it may hold any code, so the user has to name it
        if not is_file(arch):
            raise UserError(f"{path} needs the code that built its network: give --arch {meta.arch}")
        meta = replace(meta, arch=arch)
    specification = {name: getattr(meta, name) for name in ("num_classes", "conv", "groups", "pruned_num", "arch")}
    specification |= {"rule": meta.rule or 1} | (meta.build or {})

    def builder() -> nn.Module:
        try:
            check_architecture(meta.arch, meta.model)
            if not meta.ensemble:
                return build(meta.model, **specification)
            count = _count_students(content.state_dict, "learner.students.")
            networks = [build(meta.model, **specification) for _ in range(count)]
            return Ensemble(METHODS[meta.ensemble["method"]].online_teacher(networks, meta.num_classes))
        except Exception as error:  # the file may contain anything
            raise UserError(f"{path} does not say how to build its network: {error}") from error

    return build_with(content.state_dict, builder, f"{path} as {meta.model}").eval(), meta
