"""Refine a compressed student and export the better of before and after.

    python finetune.py --refine experiment/digits/resnet_pruned_18.pt --pruned --job_dir experiment/digits_refined
    python finetune.py --refine experiment/digits/checkpoint/last.pt --job_dir experiment/digits_refined

With --pruned, --refine is an exported student; without, a training checkpoint, whose best student is taken out of it.
The file says what network it is and, unless flags say otherwise, which data to refine it on.
"""

from utils import options, terminal
from utils.interruption import interruption

if __name__ == "__main__":
    terminal.guard()
    interruption.catch()
    ARGS = options.parse("finetune")  # before the imports below, which take seconds: --help and typos answer at once

import argparse
import copy
from pathlib import Path
from typing import Any

from torch import nn

import data
from data.loader import Batches, Loaders, make_loaders
from data.sources import DataSet
from model import build, check_teacher, variant_for
from model.online import Students
from utils import checkpoint, distributed, export, inputs, report
from utils.cost import Cost, check_fits, count
from utils.device import describe, pick_device, pick_execution, pick_precision
from utils.engine import Trainer
from utils.errors import UserError, run_script
from utils.evaluation import Accuracy, accuracy
from utils.job import Job
from utils.report import Results, Row
from utils.teacher import check_accuracy, pretrained_teacher


def main(args: argparse.Namespace) -> None:
    # Everything that can be wrong comes first: nothing is written before all of it is in order.
    export.check_packages(args.export)
    device = distributed.start(pick_device(args.device))
    precision = pick_precision(args.precision, device)
    execution = pick_execution(args.compile, device)
    student, source = (checkpoint.load_student if args.pruned else checkpoint.best_student)(args.refine, args.arch)
    if "ensemble" in source and not args.test_only:
        raise UserError(
            f"{args.refine} is an online teacher, which can be evaluated and exported: give --test_only, too"
        )
    take_from_file(args, source)
    check_teacher(args.arch, args.teacher_model)
    job = Job(args.job_dir, options.configuration(args))
    needed = (args.refine, args.teacher_dir)
    resumed = None if args.test_only else job.checkpoint_to_resume(args.resume, args.reset, needed)
    with distributed.first_on_each_machine():
        dataset = data.load(args.dataset, args.data_dir, args.val_size, args.workers, args.image_size, args.train_size)
    dataset = checkpoint.as_trained(dataset, source, args.refine)  # the student keeps its normalization
    loaders = make_loaders(dataset, args.train_batch_size, args.eval_batch_size, args.seed, device, args.workers)
    check_fits(student, str(args.refine), dataset.input_size, len(dataset.classes))
    teacher, remarks = pretrained_teacher(args, dataset, device)
    before = copy.deepcopy(student).to(device)
    trainer = Trainer(Students([student]), teacher, args, device, precision, execution)
    if args.test_only:
        print(f"{args.refine}: {accuracy(before, loaders.test)} on the test set")
        export_alone(args, job, before, source | dataset.meta, loaders.test)
        return
    inputs.check_unseen(source, dataset, args, args.refine)
    source.pop("accuracy", None)  # of the student before; the refined one gets its own
    history = [*source.get("history", []), source["config"]]
    meta = source | dataset.meta | {"config": options.configuration(args), "history": history}
    meta["start"] = f"from {args.refine}"
    meta["inputs"] = inputs.describe(dataset, args.data_dir, teacher=teacher, refined=before)
    if resumed:
        trainer.resume(resumed, meta, args.force)
    found = check_accuracy(teacher, loaders.val, dataset.val.targets, args.force) if teacher else None

    job.open(resumed, trainer.epoch, args.reset)
    job.logger.info(f"refining {args.refine}; {report.headline(dataset)}; {describe(device)}, {precision}, {execution}")
    for note in report.repeated(dataset):
        job.logger.info(note)
    if args.resume:
        job.logger.info(f"resuming after {trainer.reached}" if resumed else "no checkpoint yet: starting anew")
    if teacher:
        for line in (f"pretrained teacher: {found} on the validation set", *remarks):
            job.logger.info(line)
    trainer.fit(loaders.train, loaders.val, job, meta, keep_initial=True)

    trainer.load_best(job)
    found = results(args, trainer, before, teacher, source, loaders, dataset)
    report.publish(job, found, trainer, meta, dataset, device, loaders.test, args.export)
    job.close()
    distributed.stop()


def export_alone(args: argparse.Namespace, job: Job, student: nn.Module, meta: dict[str, Any], test: Batches) -> None:
    """Write the student to the job_dir in the formats of --export, if there are any.

    Raises:
        UserError: it cannot be exported, or the folder not be written.
    """
    if not (args.export and job.writes):
        return
    job.make_folder()
    exported = job.export_teacher if "ensemble" in meta else job.export
    deployment = export.write(exported, student, meta, args.export, test)
    for line in deployment.lines():
        print(line)
    if deployment.failures:
        raise UserError("; ".join(deployment.failures))


def take_from_file(args: argparse.Namespace, source: dict[str, Any]) -> None:
    """Fill in from the refined file's metadata what the flags leave open.

    Raises:
        UserError: a flag that says of the network what the file contradicts.
    """
    stated = {"arch": "arch", "student_model": "model", "conv": "conv", "groups": "groups", "pruned_num": "pruned_num"}
    for flag, key in stated.items():
        if getattr(args, flag) not in (None, source[key]):
            raise UserError(f"--{flag} {getattr(args, flag)}, but {args.refine} says {source[key]}: leave out --{flag}")
        setattr(args, flag, source[key])
    config = source["config"]
    args.dataset = args.dataset or config["dataset"]
    if args.dataset == config["dataset"]:
        args.data_dir = args.data_dir or (Path(config["data_dir"]) if config["data_dir"] else None)
        for name in ("image_size", "train_size"):
            setattr(args, name, getattr(args, name) or config.get(name))
    args.val_size = config["val_size"] if args.val_size is None else args.val_size
    args.teacher_model = args.teacher_model or config["teacher_model"]


def results(
    args: argparse.Namespace,
    trainer: Trainer,
    before: nn.Module,
    teacher: nn.Module | None,
    source: dict[str, Any],
    loaders: Loaders,
    dataset: DataSet,
) -> Results:
    """The student before and after, beside the networks of the run that it comes from, the standard one first."""
    size, splits = dataset.input_size, (loaders.val, loaders.test)
    now, then = options.configuration(args), source["config"]
    same_data = all(now[flag] == then[flag] for flag in ("dataset", "data_dir", "val_size"))
    known = {network["name"]: network for network in source.get("networks", [])} if same_data else {}
    name = report.standard_name(args.teacher_model)
    if not (standard := teacher):  # an untrained one, to compare costs with
        variant = variant_for(args.arch, args.teacher_model, size)
        standard = build(args.teacher_model, len(dataset.classes), arch=args.arch, **variant)
    found = [accuracy(teacher, batches) for batches in splits] if teacher else _recorded(known.get(name, {}))
    rows = [Row(name, "standard", count(standard, size), *found, network=standard)]
    for title, role, network in (
        ("student, before", "before", before),
        ("student, refined", "student", trainer.best_student),
    ):
        found = (accuracy(network, batches) for batches in splits)
        rows.append(Row(title, role, count(network, size), *found, network))
    if online := known.get(report.ONLINE_TEACHER):
        cost = Cost(online["params"], online["macs"])
        rows.append(Row(report.ONLINE_TEACHER, "online_teacher", cost, *_recorded(online)))
    return Results(rows)


def _recorded(network: dict[str, Any]) -> list[Accuracy | None]:
    """Validation and test accuracy of a network in the metadata of a file, None where they are unknown."""
    values = [(network.get(split), network.get(f"{split}_top5")) for split in ("val", "test")]
    return [None if top1 is None else Accuracy(top1, top5) for top1, top5 in values]


if __name__ == "__main__":
    run_script(lambda: main(ARGS))
