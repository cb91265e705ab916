"""Every flag of main.py and finetune.py, and what each may be.

Imports no torch, so that `--help` and a wrong flag answer at once.
"""

import argparse
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from utils import normalization
from utils.consistency import check, settle_finetune, settle_main
from utils.cores import cores
from utils.errors import UserError, exit_with
from utils.methods import METHODS

FORMATS = ("onnx", "torchscript", "pt2")  # of --export, and the suffixes of its files

# Flags that steer how a run is carried out, not what it computes: no part of its recorded configuration.
RUN_CONTROL = ("resume", "reset", "test_only", "force", "export", "export_teacher", "typed")
# Flags that may differ on resume because they do not change what is computed. (The number of epochs shapes a cosine
# schedule: there it is fixed. The teacher and the refined student are compared by their weights.)
MAY_CHANGE = {
    "num_epochs", "job_dir", "data_dir", "teacher_dir", "refine", "pruned", "eval_batch_size", "device", "precision",
    "compile", "workers", "print_freq", "save_every_minutes",
}  # fmt: skip
# Flags from which defaults of others follow.
CAUSES = ("pretrain", "method", "scheduler", "arch", "teacher_model", "student_model")
# Flags that say what to evaluate a training checkpoint as, and on which data.
SUBJECT = {
    "arch", "teacher_model", "student_model", "teacher_norm", "method", "lambda", "pretrain", "dataset", "data_dir",
    "image_size", "val_size", "train_size",
}  # fmt: skip
LAST = Path("checkpoint") / "last.pt"  # of a job_dir
BEST = Path("checkpoint") / "model_best.pt"
RESUME_LAST = Path("last")  # what a bare --resume stands for


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        exit_with(f"{message} (python {self.prog} --help lists the flags)")


def _number(kind: type, accepts: Callable[[float], bool], what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
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
    if not text:  # a shell's variable that is not set, which would mean the current folder
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
_count = _number(int, lambda x: x >= 0, "a whole number, 0 or more")
_seed = _number(int, lambda x: 0 <= x < 2**32, "a whole number from 0 to below 2^32")
_positive = _number(float, lambda x: x > 0, "a number above 0")
_weight = _number(float, lambda x: x >= 0, "a number, 0 or more")
_fraction = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
_size = _number(float, lambda x: x >= 0 and (x < 1 or x == int(x)), "a fraction below 1 or a whole number")
_share = _number(float, lambda x: x > 0 and (x < 1 or x == int(x)), "a fraction below 1 or a whole number, above 0")


def parse(script: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags of `script`, "main" or "finetune"; a mistake ends the process with code 2.

    With main.py's --test_only, defaults are left open: they are those of the checkpoint.
    """
    parser = build_parser(script)
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {close[0]}?" if close else ""))
    try:
        check(script, args)
        if script == "finetune":
            settle_finetune(args)
        elif args.test_only:
            words = {word.partition("=")[0] for word in argv}
            args.typed = {action.dest for action in parser._actions if not words.isdisjoint(action.option_strings)}
        else:
            settle_main(args)
    except UserError as error:
        parser.error(str(error))
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0"):  # torchrun starts it again: a process died
        args.reset = False
        if not args.resume or (args.job_dir / LAST).exists():
            args.resume = RESUME_LAST
    return args


def _defaults(field: str) -> str:
    """The default of a flag for help: that of od, and of the methods that have their own."""
    paper = getattr(METHODS["od"], field)
    own = [(name, getattr(method, field)) for name, method in METHODS.items()]
    return "; ".join([f"{paper:g}", *(f"{name}: {value:g}" for name, value in own if value not in (paper, 0))])


def build_parser(script: str) -> argparse.ArgumentParser:
    finetune = script == "finetune"
    parser = Parser(
        prog=f"{script}.py",
        allow_abbrev=False,
        description="Refine a compressed student."
        if finetune
        else "Train cheap-convolution students with an online teacher and export the best of them.",
    )

    group = parser.add_argument_group("networks")
    add = group.add_argument
    add("--arch", help="a file of model/, torchvision, timm, or a Python file (default: the one that has the network)")
    add(
        "--teacher_model",
        metavar="NAME",
        help="the standard network; of a Python file, the function that builds it (default: resnet_56)",
    )
    add("--student_model", metavar="NAME", help="the student (default: the standard network's name with _sparse)")
    add("--conv", choices=("depthwise", "group", "shift"), help="cheap convolution (default: depthwise)")
    add("--groups", type=_positive_int, help="groups of each group convolution (default: 4)")
    add("--pruned_num", type=_count, help="convolutions made cheap, counted from the output side (default: all)")
    add(
        "--num_students",
        type=_positive_int,
        help=f"students trained side by side (default: {_defaults('num_students')})",
    )

    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add(
        "--init",
        choices=("random", "teacher"),
        help="students start from random weights, as in the paper, or from those of the pretrained teacher "
        "(default: random)",
    )
    add("--teacher_dir", type=_path, metavar="PATH", help="checkpoint of the pretrained teacher, or a folder with one")
    add(
        "--teacher_norm",
        type=_normalization,
        metavar="NORM",
        help="normalization the pretrained teacher was trained with: cifar, cifar100, imagenet, none, or "
        "mean,mean,mean/std,std,std (default: as its file or its origin tells, or else the students')",
    )
    add(
        "--force",
        action="store_true",
        help="train with a pretrained teacher that does no better than guessing or that knows other classes; resume "
        "with another teacher, with another student to refine, or on other images",
    )
    add(
        "--method",
        choices=tuple(METHODS),
        help="od: online distillation, the paper's; to compare with: scratch, plain training; kd, offline distillation "
        "from the pretrained teacher; dml, deep mutual learning; one, on-the-fly native ensemble (default: od)",
    )
    add(
        "--lambda",
        dest="lam",
        type=_weight,
        metavar="WEIGHT",
        help=f"weight of the online term (default: {_defaults('lam')})",
    )
    add(
        "--miu",
        type=_weight,
        metavar="WEIGHT",
        help="weight of the pretrained teacher's term (default: 1 with --teacher_dir, else 0)",
    )
    add(
        "--temperature",
        type=_temperature,
        help=f"T of the softened distributions (default: {_defaults('temperature')})",
    )
    add(
        "--kl_reduction",
        choices=("batchmean", "element"),
        default="batchmean",
        help="batchmean sums the KL over classes; element averages, K times weaker, as the released code "
        "(default: %(default)s)",
    )
    add(
        "--detach_teacher",
        action="store_true",
        help="no online gradient to the online teacher: students learn from it, it does not learn from them",
    )
    add(
        "--rampup_epochs",
        type=_weight,
        help="epochs in which the weight of the online term rises from 0 (default: 0; one: 80 of 300)",
    )

    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--dataset",
        metavar="NAME",
        help="digits, cifar10, cifar100, fashion_mnist, svhn, imagenet or folder (default: cifar10)",
    )
    add(
        "--data_dir",
        type=_path,
        metavar="PATH",
        help="where the data is, or is downloaded to (default: data/downloads)",
    )
    add(
        "--image_size",
        type=_positive_int,
        metavar="PIXELS",
        help="of the crops of imagenet and of folder, which then streams (default: 224; a folder of small images of "
        "one size stays in memory as it is)",
    )
    add(
        "--val_size",
        type=_size,
        help="validation images split from the training set: a fraction below 1 or a number; 0 chooses the best "
        "student on the test set, as the released code did (default: 0.1)",
    )
    add(
        "--train_size",
        type=_share,
        help="training images to use of those that remain: a fraction below 1 or a number (default: all)",
    )

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--num_epochs", type=_positive_int, default=30 if finetune else 300, help="(default: %(default)s)")
    add("--train_batch_size", type=_batch, default=128, help="(default: %(default)s)")
    add("--eval_batch_size", type=_positive_int, default=100, help="(default: %(default)s)")
    add("--lr", type=_positive, default=1e-4 if finetune else 0.1, help="learning rate (default: %(default)s)")
    add("--momentum", type=_fraction, default=0.9, help="(default: %(default)s)")
    add("--weight_decay", type=_weight, default=2e-4, help="(default: %(default)s)")
    add("--scheduler", choices=("step", "cosine"), default="step", help="(default: %(default)s)")
    add(
        "--lr_decay_step",
        type=_positive_int,
        nargs="+",
        metavar="EPOCH",
        help="epochs after which --scheduler step divides the rate by 10 (default: a half and three quarters of them)",
    )
    add(
        "--warmup_epochs",
        type=_weight,
        default=0.0 if finetune else 1.0,
        help="epochs in which the rate rises from 0; the released code had none (default: %(default)s)",
    )
    add(
        "--accumulate",
        type=_positive_int,
        default=1,
        metavar="PARTS",
        help="compute a batch in so many parts, for one that does not fit into memory (default: %(default)s)",
    )
    add("--sync_bn", action="store_true", help="BatchNorm over the batches of all processes that torchrun started")
    add("--seed", type=_seed, default=0, help="(default: %(default)s)")

    group = parser.add_argument_group("job")
    add = group.add_argument
    add(
        "--job_dir",
        type=_path,
        default=Path("experiment/finetune" if finetune else "experiment/job"),
        metavar="PATH",
        help="where everything is written (default: %(default)s)",
    )
    add(
        "--resume",
        nargs="?",
        const=RESUME_LAST,
        type=_path,
        metavar="FILE",
        help="continue from a checkpoint (bare: the last one of the job_dir)",
    )
    add(
        "--save_every_minutes",
        type=_positive,
        metavar="MINUTES",
        help="also save the last checkpoint this often within an epoch (default: only after each epoch)",
    )
    add("--reset", action="store_true", help="delete what an earlier run wrote to the job_dir and start over")
    add(
        "--export",
        nargs="+",
        choices=FORMATS,
        default=[],
        metavar="FORMAT",
        help="also write the exported network as onnx, torchscript or pt2 (torch.export), ready to deploy; with "
        "finetune.py --test_only, the student as it is",
    )
    add(
        "--export_teacher",
        action="store_true",
        help="main.py: also export the online teacher, all students with the head on their features, as one network",
    )
    add("--test_only", action="store_true", help="evaluate on the test set; train and write nothing")
    add("--pretrain", action="store_true", help="main.py: train the standard network alone, to be a teacher")
    add("--refine", type=_path, metavar="FILE", help="finetune.py: the student to refine, or a training checkpoint")
    add("--pruned", action="store_true", help="finetune.py: --refine is an exported student")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the networks in training: auto is bf16 where the hardware computes in it, else fp32",
    )
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compiled code: on a CPU fused kernels (needs g++), on CUDA a graph of the training step, and with on "
        "torch.compile, too; off: PyTorch's operators one by one (default: %(default)s)",
    )
    add(
        "--workers",
        type=_positive_int,
        default=min(8, cores()),
        help="processes that read streamed images, at most one a core; threads that decode small ones (default: the "
        "number of cores, at most 8)",
    )
    add("--print_freq", type=_positive_int, default=100, help="steps between progress lines (default: %(default)s)")
    return parser


def configuration(args: argparse.Namespace) -> dict:
    """The flags that define a run, by their names, as plain values for config.json and checkpoints."""
    values = {name: value for name, value in vars(args).items() if name not in RUN_CONTROL}
    values["lambda"] = values.pop("lam")
    if values["data_dir"]:
        values["data_dir"] = values["data_dir"].resolve()  # for finetune.py, which may run in another folder
    if str(values["arch"]).endswith(".py"):
        values["arch"] = Path(values["arch"]).resolve()
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration, with what its version did where it did not know a flag yet."""
    method = "scratch" if config.get("pretrain") else "od"
    if config.get("refine"):
        method = "kd" if config.get("miu") else "scratch"
    new = dict.fromkeys(("warmup_epochs", "rampup_epochs"), 0.0) | dict.fromkeys(("detach_teacher", "sync_bn"), False)
    sizes = dict.fromkeys(("image_size", "train_size"))
    new["init"] = None if config.get("refine") else "random"
    return new | sizes | {"method": method, "accumulate": 1, "teacher_norm": None} | config


def changed_flag(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The name of a flag that makes a run another one; None if there is none.

    Args:
        was, now: configurations, of the run and with the flags that it is to go on with.
    """
    if bool(was.get("teacher_dir")) != bool(now.get("teacher_dir")):
        return "teacher_dir"
    fixed = now.keys() - MAY_CHANGE
    if now.get("scheduler") == "cosine":
        fixed |= {"num_epochs"}
    if now.get("refine"):  # finetune.py's method follows from --miu
        fixed -= {"method"}
    return next((name for name in (*CAUSES, *sorted(fixed)) if name in fixed and was.get(name) != now[name]), None)


def as_typed(name: str, value: Any) -> str:
    """For messages: "with --lr_decay_step 150 225", "without --sync_bn"."""
    if value is None or value is False:
        return f"without --{name}"
    values = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([f"with --{name}", *map(str, values)])


def take_from_run(args: argparse.Namespace, config: dict[str, Any], source: Path) -> None:
    """Set the flags in SUBJECT from the configuration of a run, recorded in `source`.

    Raises:
        UserError: a flag that was typed contradicts it.
    """
    given = configuration(args) | {"arch": args.arch}
    typed = {"lambda" if name == "lam" else name for name in args.typed} & given.keys()
    now = config | {name: given[name] for name in typed - MAY_CHANGE - {"teacher_norm"}}
    if name := changed_flag(config, now):
        raise UserError(f"{source} was trained {as_typed(name, config.get(name))}: leave out --{name}")
    for name in SUBJECT - (typed & {"data_dir", "teacher_norm"}):
        value = config[name]
        setattr(args, "lam" if name == "lambda" else name, Path(value) if name == "data_dir" and value else value)


def resume_command() -> str:
    """What to type to go on with this process's run: its command with a bare --resume, and no --reset."""
    words, machines = sys.orig_argv[1:], os.environ.get("GROUP_WORLD_SIZE")
    if machines:  # one of torchrun's
        processes = os.environ["LOCAL_WORLD_SIZE"]
        words = ["-m", "torch.distributed.run", f"--nnodes={machines}", f"--nproc_per_node={processes}", *sys.argv]
    kept = []
    for before, word in pairwise(["", *words]):
        value = before == "--resume" and not word.startswith("-")
        if not value and word not in ("--resume", "--reset") and not word.startswith("--resume="):
            kept.append(word)
    return shlex.join([sys.executable, *kept, "--resume"])
