r"""Train cheap-convolution students with an online teacher and export the best of them.

    python main.py --dataset digits --teacher_model resnet_20 --num_epochs 20 --job_dir experiment/digits
    python main.py --teacher_dir teacher.pt --teacher_model resnet_56 --student_model resnet_56_sparse \
        --lambda 0.8 --miu 1 --job_dir experiment/resnet/lambda_0.8_miu_1
    python main.py --pretrain --teacher_model resnet_56 --job_dir experiment/resnet/teacher
"""

from utils import options, terminal
from utils.interruption import interruption

if __name__ == "__main__":
    terminal.guard()
    interruption.catch()
    ARGS = options.parse("main")  # before the imports below, which take seconds: --help and typos answer at once

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import data
from data.loader import Batches, Loaders, make_loaders
from data.sources import DataSet
from model import architecture_of, build, check_architecture, check_teacher, variant_for
from model.conv import count_cheap
from model.online import Students, with_online_teacher
from utils import checkpoint, distributed, export, inputs, report
from utils.consistency import has_online_teacher, settle_main
from utils.cost import check_fits, count
from utils.device import describe, pick_device, pick_execution, pick_precision
from utils.engine import Trainer
from utils.errors import UserError, run_script
from utils.evaluation import accuracies, accuracy, evaluate
from utils.job import Job
from utils.report import Results, Row
from utils.teacher import check_accuracy, pretrained_teacher, start_from, with_normalization_of


def main(args: argparse.Namespace) -> None:
    # Everything that can be wrong comes first: nothing is written before all of it is in order.
    tested = checkpoint_to_test(args) if args.test_only else None
    export.check_packages(args.export)
    device = distributed.start(pick_device(args.device))
    precision = pick_precision(args.precision, device)
    execution = pick_execution(args.compile, device)
    if not tested:
        resolve_networks(args)
    job = Job(args.job_dir, options.configuration(args))
    resumed = None if args.test_only else job.checkpoint_to_resume(args.resume, args.reset, [args.teacher_dir])
    with distributed.first_on_each_machine():
        dataset = data.load(args.dataset, args.data_dir, args.val_size, args.workers, args.image_size, args.train_size)
    if tested:
        dataset = checkpoint.as_trained(dataset, tested["meta"], tested["path"])
    teacher, remarks = pretrained_teacher(args, dataset, device)
    if args.init == "teacher":
        dataset, teacher = with_normalization_of(teacher, dataset)
    loaders = make_loaders(dataset, args.train_batch_size, args.eval_batch_size, args.seed, device, args.workers)
    if args.test_only:
        learner = tested and restore_learner(args, tested, dataset).to(device, memory_format=torch.channels_last)
        print_test(args, learner, teacher, loaders.test)
        return
    torch.manual_seed(args.seed)
    learner = build_learner(args, dataset, teacher)
    start = start_from(teacher, learner.students) if args.init == "teacher" else "from random weights"
    trainer = Trainer(learner, teacher, args, device, precision, execution)
    meta = describe_run(args, dataset, teacher, learner, start)
    if resumed:
        trainer.resume(resumed, meta, args.force)
    found = check_accuracy(teacher, loaders.val, dataset.val.targets, args.force) if teacher else None

    job.open(resumed, trainer.epoch, args.reset)
    job.logger.info(f"{report.headline(dataset)}; {describe(device)}, {precision}, {execution}")
    for note in report.repeated(dataset):
        job.logger.info(note)
    if args.resume:
        job.logger.info(f"resuming after {trainer.reached}" if resumed else "no checkpoint yet: starting anew")
    if teacher:
        role = "" if args.miu else ", only to compare with"
        for line in (f"pretrained teacher: {found} on the validation set{role}", *remarks):
            job.logger.info(line)
    if args.init == "teacher":
        job.logger.info(f"students start {start}")
    trainer.fit(loaders.train, loaders.val, job, meta)

    trainer.load_best(job)
    found = results(args, trainer, teacher, loaders, dataset)
    if args.export_teacher:
        report.publish_teacher(job, found, meta, loaders.test, args.export)
    report.publish(job, found, trainer, meta, dataset, device, loaders.test, args.export)
    job.close()
    distributed.stop()


def resolve_networks(args: argparse.Namespace) -> None:
    """Raise a UserError for networks that cannot be built, before data is read; settles --arch and --pruned_num."""
    args.arch = args.arch or architecture_of(args.teacher_model)
    check_teacher(args.arch, args.teacher_model)
    if args.pretrain:
        args.pruned_num = 0
    else:
        check_architecture(args.arch, args.student_model)
        args.pruned_num = count_cheap(build_student(args, num_classes=1))


def build_student(args: argparse.Namespace, num_classes: int, **variant: Any) -> nn.Module:
    return build(args.student_model, num_classes, args.conv, args.groups, args.pruned_num, args.arch, **variant)


def build_standard(args: argparse.Namespace, dataset: DataSet) -> nn.Module:
    """The standard network, untrained."""
    variant = variant_for(args.arch, args.teacher_model, dataset.input_size)
    return build(args.teacher_model, len(dataset.classes), arch=args.arch, **variant)


def build_learner(args: argparse.Namespace, dataset: DataSet, teacher: nn.Module | None) -> Students:
    """The learner, untrained: the standard network alone, or students, with the teacher that --method makes of them.

    One student that no online teacher teaches (--lambda 0) needs none. Students that start from the weights of the
    pretrained teacher are of its variant of the network, such as its kind of shortcut.

    Raises:
        UserError: the networks do not take such images, or do not tell so many classes apart.
    """
    num_classes = len(dataset.classes)
    if args.pretrain:
        networks = [build_standard(args, dataset)]
    else:
        variant = variant_for(args.arch, args.student_model, dataset.input_size)
        variant |= teacher.variant if args.init == "teacher" else {}
        networks = [build_student(args, num_classes, **variant) for _ in range(args.num_students)]
    return learner_of(args, networks, dataset)


def learner_of(args: argparse.Namespace, networks: Sequence[nn.Module], dataset: DataSet) -> Students:
    """The networks, with the teacher that --method makes of them."""
    check_fits(networks[0], trained_model(args), dataset.input_size, len(dataset.classes))
    if has_online_teacher(args):
        return with_online_teacher(args.method, networks, len(dataset.classes))
    return Students(networks)


def trained_model(args: argparse.Namespace) -> str:
    return args.teacher_model if args.pretrain else args.student_model


def describe_run(
    args: argparse.Namespace, dataset: DataSet, teacher: nn.Module | None, learner: Students, start: str
) -> dict[str, Any]:
    """The metadata of this run's checkpoints and of the network that it exports."""
    config = options.configuration(args)
    return {
        "arch": config["arch"],
        "model": trained_model(args),
        "conv": args.conv,
        "groups": args.groups,
        "pruned_num": args.pruned_num,
        "build": learner.students[0].variant,
        "start": start,
        **dataset.meta,
        "inputs": inputs.describe(dataset, args.data_dir, teacher=teacher),
        "config": config,
    }


def results(
    args: argparse.Namespace, trainer: Trainer, teacher: nn.Module | None, loaders: Loaders, dataset: DataSet
) -> Results:
    """The networks of this run, the standard one first, and their accuracies: the one look at the test set."""
    learner, best, size = trainer.learner, trainer.best_student, dataset.input_size
    standard = best if args.pretrain else teacher
    known = [accuracy(standard, batches) for batches in (loaders.val, loaders.test)] if standard else []
    standard = standard or build_standard(args, dataset)  # untrained, to compare costs with
    name = report.standard_name(args.teacher_model)
    rows = [Row(name, "standard", count(standard, size), *known, network=standard)]
    if args.pretrain:
        return Results(rows)
    scores = [evaluate(learner, batches) for batches in (loaders.val, loaders.test)]
    val, test = map(accuracies, scores)
    for i, student in enumerate(learner.students):
        name, network = (f"student {i + 1}, best", best) if student is best else (f"student {i + 1}", None)
        rows.append(Row(name, "student", count(student, size), val[i], test[i], network))
    if len(val) > len(learner.students):
        rows.append(Row(report.ONLINE_TEACHER, "online_teacher", count(learner, size), val[-1], test[-1], learner))
    return Results(rows, scores[1].get("disagreement"))


def checkpoint_to_test(args: argparse.Namespace) -> dict[str, Any] | None:
    """The training checkpoint that --test_only means, and its `path`; flags that were not typed are set as it says.

    None if there is none, and a pretrained teacher to evaluate alone.

    Raises:
        UserError: neither; a damaged file; flags that contradict it.
    """
    path = args.job_dir / options.BEST if args.resume in (None, options.RESUME_LAST) else args.resume
    if args.resume is None and not path.exists():
        if not args.teacher_dir:
            raise UserError(f"--test_only finds no checkpoint {path}: give --job_dir, --resume FILE or --teacher_dir")
        settle_main(args)
        return None
    content = checkpoint.load_checkpoint(path)
    meta = checkpoint.with_code(path, content["meta"], args.arch)
    options.take_from_run(args, meta["config"] | {"arch": meta["arch"]}, path)
    return content | {"path": path, "meta": meta}


def restore_learner(args: argparse.Namespace, tested: dict[str, Any], dataset: DataSet) -> Students:
    learner = learner_of(args, checkpoint.all_students(tested["path"], tested, args.arch), dataset)
    checkpoint.load_weights(learner, tested["model"], str(tested["path"]))
    return learner


def print_test(args: argparse.Namespace, learner: Students | None, teacher: nn.Module | None, test: Batches) -> None:
    """Print the test accuracies of the pretrained teacher and of the networks of a training checkpoint, if given."""
    found = {"pretrained teacher": accuracy(teacher, test)} if teacher else {}
    if learner:
        several = [f"student {i + 1}" for i in range(len(learner.students))]
        names = [args.teacher_model] if args.pretrain else [*several, report.ONLINE_TEACHER]
        found |= zip(names, accuracies(evaluate(learner, test)), strict=False)
    for name, value in found.items():
        print(f"{name}: {value} on the test set")


if __name__ == "__main__":
    run_script(lambda: main(ARGS))
