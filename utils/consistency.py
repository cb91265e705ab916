"""What flags mean together: contradictions, and defaults that depend on other flags. Imports no torch."""

import argparse
from collections.abc import Sequence

from utils.errors import UserError
from utils.methods import METHODS

METHOD_FLAGS = ("method", "lam", "miu", "detach_teacher", "rampup_epochs")


def check(script: str, args: argparse.Namespace) -> None:
    """Raise a UserError for flags that contradict each other, or the script, whatever the others are."""
    if script == "main":
        for flag in ("refine", "pruned"):
            if getattr(args, flag):
                raise UserError(f"--{flag} belongs to finetune.py: main.py trains students from the start")
        if args.test_only and (args.export or args.export_teacher):
            raise UserError(
                "main.py --test_only writes nothing: leave out --export and --export_teacher, or export a student with "
                "finetune.py --refine FILE --pruned --test_only --export"
            )
    if args.resume and args.reset:
        raise UserError("--resume continues a run and --reset deletes it: give one of them")
    if args.test_only and args.reset:
        raise UserError("--test_only writes nothing: leave out --reset")
    if not args.teacher_dir:
        _refuse(args, ("teacher_norm",), "{flag} is about a pretrained teacher: give --teacher_dir, too")
        if not args.resume:
            _refuse(args, ("force",), "{flag} is about a pretrained teacher or a resumed run: leave it out")
    args.export = list(dict.fromkeys(args.export))


def settle_main(args: argparse.Namespace) -> None:
    """Fill in what the flags of main.py leave open. Raises a UserError for flags that contradict each other."""
    if args.pretrain:
        networks = ("student_model", "conv", "groups", "pruned_num", "num_students", "teacher_dir", "init")
        _refuse(args, (*networks, *METHOD_FLAGS), "--pretrain trains the standard network alone: leave out {flag}")
    if args.teacher_model is None:
        args.arch, args.teacher_model = args.arch or "resnet", "resnet_56"
    args.dataset = args.dataset or "cifar10"
    args.val_size = 0.1 if args.val_size is None else args.val_size
    if args.pretrain:
        args.method, args.num_students = "scratch", 1
    else:
        args.student_model = args.student_model or f"{args.teacher_model}_sparse"
        if not args.student_model.endswith("_sparse"):
            cheap = ("conv", "groups", "pruned_num")
            _refuse(args, cheap, f"{args.student_model} has no cheap convolutions: leave out {{flag}} or add _sparse")
        args.conv = args.conv or "depthwise"
        if args.conv != "group":
            _refuse(args, ("groups",), "{flag} belongs to --conv group")
        args.groups = args.groups or 4
        args.method = args.method or "od"
        args.num_students = args.num_students or METHODS[args.method].num_students
        if args.init == "teacher" and not args.teacher_dir:
            raise UserError("--init teacher starts students from a pretrained teacher's weights: give --teacher_dir")
        if args.init == "teacher" and args.student_model.removesuffix("_sparse") != args.teacher_model:
            raise UserError(
                f"--init teacher needs a student of the teacher's own architecture: give --student_model "
                f"{args.teacher_model}_sparse"
            )
    args.init = args.init or "random"
    _settle_common(args)


def settle_finetune(args: argparse.Namespace) -> None:
    """The same for finetune.py; what the file to refine says comes later."""
    if args.refine is None:
        raise UserError("--refine FILE is missing: name the student (with --pruned) or the checkpoint to refine")
    if args.pretrain:
        raise UserError("--pretrain belongs to main.py")
    _refuse(args, ("lam", "detach_teacher", "rampup_epochs"), "finetune.py has no online teacher: leave out {flag}")
    _refuse(args, ("init",), "finetune.py starts from the student that it refines: leave out {flag}")
    _refuse(args, ("method",), "finetune.py distills from --teacher_dir, or trains without: leave out {flag}")
    if (args.num_students or 1) != 1:
        raise UserError("finetune.py refines one student: leave out --num_students")
    args.method, args.num_students = "kd" if args.teacher_dir and args.miu != 0 else "scratch", 1
    _settle_common(args)


def _settle_common(args: argparse.Namespace) -> None:
    if args.miu and not args.teacher_dir:
        raise UserError(f"--miu {args.miu:g} needs a pretrained teacher: give --teacher_dir, or --miu 0 to do without")
    _settle_method(args)
    if args.scheduler == "cosine":
        _refuse(args, ("lr_decay_step",), "{flag} belongs to --scheduler step")
    elif args.lr_decay_step is None:
        args.lr_decay_step = [max(1, args.num_epochs // 2), max(1, args.num_epochs * 3 // 4)]


def has_online_teacher(args: argparse.Namespace) -> bool:
    """Whether an online teacher is trained: one student that learns nothing from it (--lambda 0) needs none."""
    return args.method == "one" or (args.method == "od" and (args.lam > 0 or args.num_students > 1))


def _settle_method(args: argparse.Namespace) -> None:
    name, method = args.method, METHODS[args.method]
    if not method.lam:
        _refuse(args, ("lam", "rampup_epochs"), f"--method {name} has no online term: leave out {{flag}}")
    if not method.pretrained:
        _refuse(args, ("miu",), f"--method {name} learns from no pretrained teacher: leave out {{flag}}")
    if name == "kd" and not (args.teacher_dir and args.miu != 0):
        raise UserError("--method kd learns from a pretrained teacher: give --teacher_dir, and no --miu 0")
    if name in ("dml", "one") and args.num_students < 2:
        raise UserError(f"with --method {name} students learn of each other: --num_students must be 2 or more")
    if name != "od":
        _refuse(args, ("detach_teacher",), f"{{flag}} belongs to --method od: {name} has nothing that it could detach")
    for flag, default in (("lam", method.lam), ("temperature", method.temperature)):
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    if args.miu is None:
        args.miu = 1.0 if args.teacher_dir and method.pretrained else 0.0
    if args.rampup_epochs is None:
        args.rampup_epochs = method.rampup * args.num_epochs
    if args.export_teacher and not has_online_teacher(args):
        raise UserError("--export_teacher exports the online teacher, and this run has none: leave it out")


def _refuse(args: argparse.Namespace, names: Sequence[str], message: str) -> None:
    """Raise a UserError for the first of these flags that asks for something."""
    for name in names:
        if getattr(args, name):
            flag = {"lam": "lambda"}.get(name, name)
            raise UserError(message.format(flag=f"--{flag}"))
