"""A run's configuration: every flag of main.py and finetune.py, each defined once. Imports no torch.

To add a flag, add a field to `Config`. The parser, `--help`, config.json and the README's list follow from it.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from utils import normalization
from utils.errors import UserError
from utils.methods import METHODS

FORMATS = ("onnx", "torchscript", "pt2")  # of --export, and the suffixes of its files
LAST = Path("checkpoint") / "last.pt"  # of a job_dir
AUTO = "auto"  # of --pruned_num
BEST = Path("checkpoint") / "model_best.pt"
RESUME_LAST = Path("last")  # what a bare --resume stands for


def _number(kind: type, accepts: Callable[[float], bool], what: str, *words: str) -> Callable[[str], float | str]:
    def parse(text: str) -> float | str:
        if text in words:
            return text
        try:
            value = kind(text)
            if math.isfinite(value) and accepts(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"must be {what}, not '{text}'")

    return parse


def _path(text: str) -> Path:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be valid UTF-8, not {text!a}") from None
    if not text:  # an unset shell variable; Path("") would be the current folder
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def _normalization(text: str) -> str:
    try:
        normalization.parse(text)
    except ValueError:
        known = ", ".join(normalization.NORMALIZATIONS)
        raise argparse.ArgumentTypeError(
            f"must be {known} or three means and three deviations as in 0.5,0.5,0.5/0.5,0.5,0.5, not '{text}'"
        ) from None
    return text


_positive_int = _number(int, lambda x: 0 < x < 2**31, "a whole number above 0")
_batch = _number(int, lambda x: 1 < x < 2**31, "a whole number above 1 (BatchNorm cannot train on a single image)")
_temperature = _number(float, lambda x: 0 < x <= 1000, "a number above 0, at most 1000")
_seed = _number(int, lambda x: 0 <= x < 2**32, "a whole number from 0 to below 2^32")
_positive = _number(float, lambda x: x > 0, "a number above 0")
_weight = _number(float, lambda x: x >= 0, "a number, 0 or more")
_fraction = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
_size = _number(float, lambda x: x >= 0 and (x < 1 or x == int(x)), "a fraction below 1 or a whole number")
_share = _number(float, lambda x: x > 0 and (x < 1 or x == int(x)), "a fraction below 1 or a whole number, above 0")
_part = _number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
_pruned_num = _number(int, lambda x: x >= 0, "a whole number, 0 or more, or auto", AUTO)
_TYPES = {int: _positive_int, float: _weight, Path: _path}  # of flags that state no other one


def _by_method(name: str, shown: Callable[[float], str] = "{:g}".format) -> str:
    """For help: the default of od, and those of the methods that differ."""
    usual = getattr(METHODS["od"], name)
    others = ((method.name, getattr(method, name)) for method in METHODS.values())
    return "; ".join(
        [f"{usual:g}", *(f"{method}: {shown(value)}" for method, value in others if value not in (usual, 0))]
    )


def _flag(group: str, help: str, default: Any = None, *, finetune: Any = None, **arguments: Any) -> Any:
    """A field of `Config` that is a flag.

    Args:
        group: under which --help lists it.
        default: None if it depends on other flags or on a file; utils/options.py then fills it in.
        finetune: default in finetune.py, if it differs.
        arguments: for argparse's add_argument, where `type` is by default that of the field; and `recorded`, whether it
            is part of the recorded configuration (True); `may_change`, whether it may differ on resume because it does
            not change what is computed (False).
    """
    return field(default=default, metadata={"group": group, "help": help, "finetune": finetune, **arguments})


_network, _distillation, _data, _training = (
    partial(_flag, group) for group in ("networks", "distillation", "data", "training")
)
_job, _machine = (partial(_flag, group, may_change=True) for group in ("job", "machine"))
_control = partial(_job, recorded=False)  # how a run is carried out, not what it computes


@dataclass(frozen=True)
class Config:
    """The flags by name, made by `utils.options.parse` and never changed."""

    arch: str | None = _network(
        "source of the networks: a file of model/, torchvision, timm or a Python file (default: the file of model/ "
        "that has the student)"
    )
    teacher_model: str = _network(
        "the standard network; in a Python file, the function that returns it (default: resnet_56)", metavar="NAME"
    )
    student_model: str | None = _network(
        "the student (default: the standard network's name with _sparse)", metavar="NAME"
    )
    conv: str | None = _network("cheap convolution (default: depthwise)", choices=("depthwise", "group", "shift"))
    groups: int | None = _network("groups of each group convolution (default: 4)")
    pruned_num: int | str | None = _network(
        "number of convolutions to replace, counted from the output, or auto: those that cost the least for the budget "
        "of --macs or --max_drop (default: all)",
        type=_pruned_num,
    )
    macs: float | None = _network(
        "with --pruned_num auto: largest share of the standard network's MACs", type=_part, metavar="SHARE"
    )
    max_drop: float | None = _network(
        "with --pruned_num auto: largest drop of validation accuracy before training", type=_positive, metavar="POINTS"
    )
    num_students: int = _network(f"students trained side by side (default: {_by_method('num_students')})")

    init: str | None = _distillation(
        "initial weights of the students: random, as in the paper, or those of the pretrained teacher "
        "(default: random)",
        choices=("random", "teacher"),
    )
    teacher_dir: Path | None = _distillation(
        "checkpoint of the pretrained teacher, or a folder with one", metavar="PATH", may_change=True
    )
    teacher_norm: str | None = _distillation(
        "normalization the pretrained teacher was trained with: cifar, cifar100, imagenet, none, or "
        "mean,mean,mean/std,std,std (default: that of its file or its project, else the students')",
        type=_normalization,
        metavar="NORM",
    )
    force: bool = _distillation(
        "allow a pretrained teacher that is no better than guessing or has other classes; allow --resume with another "
        "teacher, another student to refine, or other images",
        False,
        recorded=False,
    )
    method: str = _distillation(
        f"{'; '.join(f'{method.name}: {method.title}' for method in METHODS.values())} (default: od, the paper's)",
        choices=tuple(METHODS),
    )
    lam: float = _distillation(f"weight of the online term (default: {_by_method('lam')})", metavar="WEIGHT")
    miu: float = _distillation(
        "weight of the pretrained teacher's term (default: 1 with --teacher_dir, else 0)", metavar="WEIGHT"
    )
    temperature: float = _distillation(
        f"T of the softened distributions (default: {_by_method('temperature')})", type=_temperature
    )
    kl_reduction: str = _distillation(
        "batchmean: the KL is summed over the classes; element: averaged, K times weaker, as in the released code",
        "batchmean",
        choices=("batchmean", "element"),
    )
    detach_teacher: bool = _distillation(
        "students learn from the online teacher, but it does not learn from them: its logits are detached", False
    )
    rampup_epochs: float = _distillation(
        "epochs in which the weight of the online term rises from 0 (default: "
        f"{_by_method('rampup', lambda share: f'{300 * share:g} of 300')})"
    )

    dataset: str = _data(
        "digits, cifar10, cifar100, fashion_mnist, svhn, imagenet or folder (default: cifar10)", metavar="NAME"
    )
    data_dir: Path | None = _data(
        "folder with the data, or for downloads (default: data/downloads)", metavar="PATH", may_change=True
    )
    labels: Path | None = _data(
        "CSV file with the classes of a folder's images: columns path (below --data_dir), label and, if wanted, split "
        "(train, val or test; default: the images are in class folders)",
        metavar="FILE.csv",
        may_change=True,
    )
    image_size: int | None = _data(
        "height and width of the crops of imagenet and folder (default: 224; small images of one size are not resized)",
        metavar="PIXELS",
    )
    val_size: float = _data(
        "validation images split from the training set: a fraction below 1 or a number; with 0, the best student is "
        "chosen on the test set, as in the released code (default: 0.1)",
        type=_size,
    )
    train_size: float | None = _data(
        "training images to use, after the split: a fraction below 1 or a number (default: all)", type=_share
    )

    num_epochs: int = _training("passes over the training images", 300, finetune=30, may_change=True)
    train_batch_size: int = _training("images per step, of all processes together", 128, type=_batch)
    eval_batch_size: int = _training("images per batch in validation and test", 100, may_change=True)
    lr: float = _training("learning rate", 0.1, finetune=1e-4, type=_positive)
    momentum: float = _training("of SGD", 0.9, type=_fraction)
    nesterov: bool = _training("Nesterov momentum, as in timm's sgd", False)
    weight_decay: float = _training("of SGD, on all parameters", 2e-4)
    label_smoothing: float = _training(
        "label smoothing of the training cross-entropy, of the students and of the online teacher; not of the KL terms",
        0.0,
        type=_fraction,
    )
    scheduler: str = _training("learning rate schedule", "step", choices=("step", "cosine"))
    lr_decay_step: list[int] | None = _training(
        "epochs after which --scheduler step divides the rate by 10 (default: a half and three quarters of them)",
        type=_positive_int,
        nargs="+",
        metavar="EPOCH",
    )
    warmup_epochs: float = _training(
        "epochs in which the rate rises from 0; the released code had none", 1.0, finetune=0.0
    )
    accumulate: int = _training(
        "gradient accumulation steps, for a batch that does not fit into memory", 1, metavar="PARTS"
    )
    sync_bn: bool = _training("BatchNorm statistics over the processes of torchrun", False)
    seed: int = _training(
        "seed of the initial weights and the augmentation; the validation split does not depend on it", 0, type=_seed
    )

    job_dir: Path = _job(
        "folder for everything that the run writes",
        Path("experiment/job"),
        finetune=Path("experiment/finetune"),
        metavar="PATH",
    )
    resume: Path | None = _control(
        "continue from a checkpoint (bare: the last one of the job_dir)", nargs="?", const=RESUME_LAST, metavar="FILE"
    )
    save_every_minutes: float | None = _job(
        "also save the last checkpoint this often within an epoch (default: only after each epoch)",
        type=_positive,
        metavar="MINUTES",
    )
    reset: bool = _control("delete what an earlier run wrote to the job_dir and start over", False)
    export: tuple[str, ...] = _control(
        "also write the exported network as onnx, torchscript or pt2 (torch.export), ready to deploy; with "
        "finetune.py --test_only, the student as it is",
        (),
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
    )
    export_teacher: bool = _control(
        "main.py: also export the online teacher, all students with the head on their features, as one network", False
    )
    test_only: bool = _control("evaluate on the test set; train and write nothing", False)
    pretrain: bool = _job("main.py: train the standard network alone, to be a teacher", False, may_change=False)
    refine: Path | None = _job("finetune.py: the student to refine, or a training checkpoint", metavar="FILE")
    pruned: bool = _job("finetune.py: --refine is an exported student", False)

    device: str = _machine("auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps", "auto")
    precision: str = _machine(
        "of the networks in training; auto: bf16 if the hardware has units for it, else fp32",
        "auto",
        choices=("auto", "fp32", "bf16"),
    )
    compile: str = _machine(
        "auto: fused kernels on a CPU (needs g++), a graph of the training step on CUDA; on: the same, and on CUDA "
        "torch.compile; off: PyTorch's operators",
        "auto",
        choices=("auto", "on", "off"),
    )
    workers: int | None = _machine(
        "processes that read streamed images, or threads that decode small ones, at most one per core (default: the "
        "number of cores, at most 8)"
    )
    print_freq: int = _machine("steps between progress lines", 100)

    typed: frozenset[str] = frozenset()  # the fields whose flags were typed

    @property
    def trained_model(self) -> str:
        """Name of the network that main.py trains and exports."""
        return self.teacher_model if self.pretrain else self.student_model

    def filled(self, **defaults: Any) -> "Config":
        """The configuration with these values for the fields that have none."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def refuse(self, *names: str, message: str) -> None:
        """Raise a UserError with `message`, in which {flag} is filled in, for the first of these fields that is set."""
        for name in names:
            if getattr(self, name):
                raise UserError(message.format(flag=f"--{flag_name(name)}"))

    def recorded(self) -> dict[str, Any]:
        """The flags that define a run, by their names, as plain values for config.json and checkpoints."""
        values = {field.name: getattr(self, field.name) for field in flags() if field.metadata.get("recorded", True)}
        for name in ("data_dir", "labels"):  # for finetune.py, which may run in another folder
            values[name] = values[name] and values[name].resolve()
        if str(self.arch).endswith(".py"):
            values["arch"] = Path(self.arch).resolve()
        return {flag_name(name): str(value) if isinstance(value, Path) else value for name, value in values.items()}


def flags() -> Iterator[dataclasses.Field]:
    """The fields of `Config` that are flags; `metadata` has the arguments of `_flag`."""
    return (field for field in dataclasses.fields(Config) if "group" in field.metadata)


def argument_type(field: dataclasses.Field) -> Callable[[str], Any] | None:
    """The function that parses a flag's values, as argparse's `type`; None if any text is one."""
    kinds = (field.type, *get_args(field.type))  # int | None has the arguments int and None
    return field.metadata.get("type") or next((_TYPES[kind] for kind in kinds if kind in _TYPES), None)


def is_open(default: Any) -> bool:
    """Whether a flag has no default to state: it is off, or depends on something else."""
    return default is None or default is False or default == ()


def flag_name(field: str) -> str:
    """The flag of a field of `Config`, without its dashes; `lam` is lambda, which is a keyword of Python."""
    return "lambda" if field == "lam" else field
