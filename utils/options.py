"""From the command line to the configuration of a run: parsing, contradictions, defaults that depend on other flags.

Imports no torch, so that `--help` and a wrong flag answer at once.
"""

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import Field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils.config import AUTO, LAST, RESUME_LAST, Config, argument_type, flag_name, flags, is_open
from utils.errors import UserError, exit_with
from utils.methods import METHODS

if TYPE_CHECKING:
    from utils.checkpoint import Meta

DESCRIPTIONS = {
    "main": "Train cheap-convolution students with an online teacher and export the best of them.",
    "finetune": "Refine a compressed student.",
}
_CONVOLUTIONS = ("conv", "groups", "pruned_num", "macs", "max_drop")
MAY_CHANGE = {flag_name(field.name) for field in flags() if field.metadata.get("may_change")}
# Flags from which defaults of others follow.
_CAUSES = ("pretrain", "method", "scheduler", "arch", "teacher_model", "student_model")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        exit_with(f"{message} (python {self.prog} --help lists the flags)")


def build_parser(script: str) -> argparse.ArgumentParser:
    """The parser of "main" or "finetune"; its result has only the flags that were typed."""
    parser = Parser(
        prog=f"{script}.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=DESCRIPTIONS[script],
    )
    for title, fields in groupby(flags(), key=lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in fields:
            keys = field.metadata.keys() & {"choices", "metavar", "nargs", "const"}
            arguments = {key: field.metadata[key] for key in keys}
            arguments |= {"action": "store_true"} if field.type is bool else {"type": argument_type(field)}
            default = _default(script, field)
            arguments["help"] = field.metadata["help"] + ("" if is_open(default) else f" (default: {default})")
            group.add_argument(f"--{flag_name(field.name)}", dest=field.name, **arguments)
    return parser


def _default(script: str, field: Field) -> Any:
    own = field.metadata["finetune"] if script == "finetune" else None
    return field.default if own is None else own


def parse(script: str, argv: Sequence[str] | None = None) -> Config:
    """Parse, check and settle the flags of `script`, "main" or "finetune"; a mistake ends the process with code 2.

    Some defaults come from a file: `for_refinement` fills in those of finetune.py, `for_test` those of main.py
    --test_only.
    """
    parser = build_parser(script)
    given, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {close[0]}?" if close else ""))
    values = {field.name: _default(script, field) for field in flags()} | vars(given)
    values["export"] = tuple(dict.fromkeys(values["export"]))
    try:
        config = Config(**values, typed=frozenset(vars(given)))
        _check(script, config)
        if script == "finetune":
            config = _settle_finetune(config)
        elif not config.test_only:
            config = settle_main(config)
    except UserError as error:
        parser.error(str(error))
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0"):  # torchrun starts it again: a process died
        last = config.resume if config.resume and not (config.job_dir / LAST).exists() else RESUME_LAST
        config = replace(config, reset=False, resume=last)
    return config


def _check(script: str, config: Config) -> None:
    """Raise a UserError for flags that contradict each other or the script in every configuration."""
    if script == "main":
        config.refuse(
            "refine", "pruned", message="{flag} belongs to finetune.py: main.py trains students from the start"
        )
        if config.test_only and (config.export or config.export_teacher):
            raise UserError(
                "main.py --test_only writes nothing: leave out --export and --export_teacher, or export a student with "
                "finetune.py --refine FILE --pruned --test_only --export"
            )
    if config.resume and config.reset:
        raise UserError("--resume continues a run and --reset deletes it: give one of them")
    if config.test_only and config.reset:
        raise UserError("--test_only writes nothing: leave out --reset")
    if not config.teacher_dir:
        config.refuse("teacher_norm", message="{flag} is about a pretrained teacher: give --teacher_dir, too")
        if not config.resume:
            config.refuse("force", message="{flag} is about a pretrained teacher or a resumed run: leave it out")


def settle_main(config: Config) -> Config:
    """Fill in the defaults of main.py that depend on other flags.

    Raises:
        UserError: flags contradict each other.
    """
    if config.pretrain:
        config.refuse(
            *("student_model", *_CONVOLUTIONS, "num_students", "teacher_dir", "init"),
            *("method", "lam", "miu", "detach_teacher", "rampup_epochs"),
            message="--pretrain trains the standard network alone: leave out {flag}",
        )
    if config.teacher_model is None:
        config = config.filled(arch="resnet", teacher_model="resnet_56")
    config = config.filled(dataset="cifar10", val_size=0.1, init="random")
    config = replace(config, method="scratch", num_students=1) if config.pretrain else _settle_students(config)
    return _settle_training(config)


def _settle_students(config: Config) -> Config:
    config = config.filled(student_model=f"{config.teacher_model}_sparse", method="od")
    if not config.student_model.endswith("_sparse"):
        message = f"{config.student_model} has no cheap convolutions: leave out {{flag}} or add _sparse"
        config.refuse(*_CONVOLUTIONS, message=message)
    if config.conv != "group":
        config.refuse("groups", message="{flag} belongs to --conv group")
    if config.pruned_num != AUTO:
        config.refuse("macs", "max_drop", message="{flag} is a budget for --pruned_num auto: give it, too")
    elif (config.macs is None) == (config.max_drop is None):
        raise UserError("--pruned_num auto needs one budget: give either --macs SHARE or --max_drop POINTS")
    elif config.init != "teacher":
        raise UserError("--pruned_num auto compares students with the teacher's weights: give --init teacher")
    if config.init == "teacher" and not config.teacher_dir:
        raise UserError("--init teacher starts students from a pretrained teacher's weights: give --teacher_dir")
    if config.init == "teacher" and config.student_model.removesuffix("_sparse") != config.teacher_model:
        raise UserError(
            f"--init teacher needs a student of the teacher's own architecture: give --student_model "
            f"{config.teacher_model}_sparse"
        )
    return config.filled(conv="depthwise", groups=4, num_students=METHODS[config.method].num_students)


def _settle_finetune(config: Config) -> Config:
    """The same for finetune.py; the defaults that come from the file to refine stay open."""
    if config.refine is None:
        raise UserError("--refine FILE is missing: name the student (with --pruned) or the checkpoint to refine")
    config.refuse("pretrain", message="{flag} belongs to main.py")
    chosen = ["pruned_num"] if config.pruned_num == AUTO else ["macs", "max_drop"]
    config.refuse(*chosen, message="finetune.py keeps the convolutions of the student: leave out {flag}")
    message = "finetune.py has no online teacher: leave out {flag}"
    config.refuse("lam", "detach_teacher", "rampup_epochs", message=message)
    config.refuse("init", message="finetune.py starts from the student that it refines: leave out {flag}")
    config.refuse("method", message="finetune.py distills from --teacher_dir, or trains without: leave out {flag}")
    if (config.num_students or 1) != 1:
        raise UserError("finetune.py refines one student: leave out --num_students")
    method = "kd" if config.teacher_dir and config.miu != 0 else "scratch"
    return _settle_training(replace(config, method=method, num_students=1))


def _settle_training(config: Config) -> Config:
    if config.miu and not config.teacher_dir:
        raise UserError(
            f"--miu {config.miu:g} needs a pretrained teacher: give --teacher_dir, or --miu 0 to do without"
        )
    method = METHODS[config.method]
    method.check(config)
    defaults = {
        "lam": method.lam,
        "temperature": method.temperature,
        "miu": 1.0 if config.teacher_dir and method.uses_pretrained else 0.0,
        "rampup_epochs": method.rampup * config.num_epochs,
    }
    if config.momentum == 0:
        config.refuse("nesterov", message="{flag} needs a --momentum above 0")
    if config.scheduler == "cosine":
        config.refuse("lr_decay_step", message="{flag} belongs to --scheduler step")
    else:
        half = max(1, config.num_epochs // 2)
        defaults["lr_decay_step"] = [half, max(half + 1, config.num_epochs * 3 // 4)]
    config = config.filled(**defaults)
    if config.export_teacher and not method.has_online_teacher(config):
        raise UserError("--export_teacher exports the online teacher, and this run has none: leave it out")
    return config


def for_refinement(config: Config, meta: "Meta") -> Config:
    """Fill in the defaults of finetune.py that come from the metadata of the file to refine.

    Raises:
        UserError: a flag contradicts the metadata.
    """
    stated = {"arch": meta.arch, "student_model": meta.model, "conv": meta.conv, "groups": meta.groups}
    stated["pruned_num"] = meta.pruned_num
    for name, value in stated.items():
        if (given := getattr(config, name)) not in (None, value):
            raise UserError(f"--{name} {given}, but {config.refine} says {value}: leave out --{name}")
    then, names = meta.config, ["dataset", "val_size", "teacher_model"]
    if config.dataset in (None, then["dataset"]):
        names += ["data_dir", "image_size", "train_size"]
        names += [] if config.data_dir else ["labels"]  # they belong to the folder
    return config.filled(**stated, **_fields(then, names))


def for_test(config: Config, run: dict[str, Any], source: Path) -> Config:
    """The configuration of main.py --test_only for a training checkpoint: its run's, but for flags that may change.

    Args:
        run: recorded configuration of the checkpoint's run.
        source: the checkpoint.

    Raises:
        UserError: a flag that was typed contradicts it.
    """
    given = config.recorded() | {"arch": config.arch}
    typed = {flag_name(name) for name in config.typed} & given.keys()
    now = run | {name: given[name] for name in typed - MAY_CHANGE - {"teacher_norm"}}
    if name := changed_flag(run, now):
        raise UserError(f"{source} was trained {as_typed(name, run.get(name))}: leave out --{name}")
    names = {field.name for field in flags() if flag_name(field.name) in given.keys() - MAY_CHANGE}
    names |= {"data_dir", "labels"}
    return replace(config, **_fields(run, names - (config.typed & {"data_dir", "labels", "teacher_norm"})))


def _fields(record: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Values of fields from a recorded configuration."""
    found = {name: record[flag_name(name)] for name in names}
    return found | {name: Path(found[name]) for name in ("data_dir", "labels") if found.get(name)}


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration in which the flags that its version lacked describe what that version did."""
    then = {"method": "scratch" if config.get("pretrain") else "od", "init": "random"}
    if config.get("refine"):
        then = {"method": "kd" if config.get("miu") else "scratch", "init": None}
    then |= {"warmup_epochs": 0.0, "rampup_epochs": 0.0}
    return Config().recorded() | then | config


def changed_flag(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Name of a flag that differs although a resumed run must keep it; None if there is none.

    Args:
        was, now: recorded configurations of the checkpoint and of the command that resumes it.
    """
    if bool(was.get("teacher_dir")) != bool(now.get("teacher_dir")):
        return "teacher_dir"
    fixed = now.keys() - MAY_CHANGE
    if now.get("scheduler") == "cosine":  # whose rate depends on the number of epochs
        fixed |= {"num_epochs"}
    if now.get("refine"):  # finetune.py's method follows from --miu
        fixed -= {"method"}
    return next((name for name in (*_CAUSES, *sorted(fixed)) if name in fixed and was.get(name) != now[name]), None)


def as_typed(name: str, value: Any) -> str:
    """For messages: "with --lr_decay_step 150 225", "without --sync_bn"."""
    return f"without --{name}" if value is None or value is False else f"with {shlex.join(_words(name, value))}"


def command(config: Config) -> tuple[str, str]:
    """The command line that starts a run with this configuration, and the flags that it leaves at their defaults.

    The command has the flags that were typed, except --resume and --reset; --job_dir is the last, easy to replace.
    """
    recorded = config.recorded()
    typed, defaults = [], []
    for field in sorted(flags(), key=lambda field: field.name == "job_dir"):
        name = flag_name(field.name)
        value = recorded.get(name, getattr(config, field.name))
        if not is_open(value) and field.name not in ("resume", "reset"):
            (typed if field.name in config.typed else defaults).extend(_words(name, value))
    launcher = ["python"]
    if "GROUP_WORLD_SIZE" in os.environ:  # torchrun started it
        machines, processes = (os.environ[name] for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        launcher = ["torchrun", f"--nnodes={machines}", f"--nproc_per_node={processes}"]
    return shlex.join([*launcher, "finetune.py" if config.refine else "main.py", *typed]), shlex.join(defaults)


def _words(name: str, value: Any) -> list[str]:
    """A flag and its value as words of a command line."""
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, list | tuple) else [value]
    words = [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values]
    return [f"--{name}={words[0]}"] if words[0].startswith("-") else [f"--{name}", *words]
