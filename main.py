r"""Train cheap-convolution students with an online teacher and export the best of them.

    python main.py --dataset digits --teacher_model resnet_20 --num_epochs 20 --job_dir experiment/digits
    python main.py --teacher_dir teacher.pt --teacher_model resnet_56 --student_model resnet_56_sparse \
        --lambda 0.8 --miu 1 --job_dir experiment/resnet/lambda_0.8_miu_1
    python main.py --pretrain --teacher_model resnet_56 --job_dir experiment/resnet/teacher
"""

from utils import options
from utils.errors import UserError, guard
from utils.interruption import interruption

if __name__ == "__main__":
    guard()
    interruption.catch()
    CONFIG = options.parse("main")  # before the imports below, which take seconds: --help and typos answer at once

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from model import architecture_of, build, check_architecture, check_teacher, variant_for
from model.conv import count_cheap
from model.convert import RULE, remarks
from model.online import Students
from model.weights import load_weights, place
from utils import checkpoint, report
from utils.checkpoint import Inputs, Meta, TrainingCheckpoint
from utils.config import AUTO, BEST, RESUME_LAST, Config
from utils.methods import METHODS
from utils.metrics import accuracy, evaluate
from utils.setup import Run, prepare, run_script, standard_network
from utils.tables import ONLINE_TEACHER


def main(config: Config) -> None:
    if config.test_only:
        print_test(config)
        return
    config = with_networks(config)
    run = prepare(config)
    torch.manual_seed(config.seed)
    networks, budget = build_networks(run)
    learner = run.learner(networks)
    start, notes = run.start(learner.students), remarks(learner.students[0])
    if config.init == "teacher":
        notes.append(f"students start {start}")
    trainer, meta = run.trainer(learner), describe_run(run, learner, start, budget)
    run.train(trainer, meta, notes)

    report.publish(run, trainer, meta, *report.results(run, trainer))
    run.end()


def with_networks(config: Config) -> Config:
    """With the architecture and the number of cheap convolutions; raises a UserError if a network cannot be built."""
    check_teacher(config.arch, config.teacher_model)
    config = replace(config, arch=config.arch or architecture_of(config.trained_model))
    check_architecture(config.arch, config.trained_model)
    if config.pretrain:
        return replace(config, pruned_num=0)
    number = count_cheap(build_student(config, num_classes=1))
    return config if config.pruned_num == AUTO else replace(config, pruned_num=number)


def build_student(config: Config, num_classes: int, **variant: Any) -> nn.Module:
    number = None if config.pruned_num == AUTO else config.pruned_num
    return build(config.student_model, num_classes, config.conv, config.groups, number, config.arch, **variant)


def build_networks(run: Run) -> tuple[list[nn.Module], list[list[float]] | None]:
    """The standard network, or students (with --init teacher of its variant) and what --pruned_num auto compared."""
    config, dataset = run.config, run.dataset
    if config.pretrain:
        return [standard_network(config, dataset)], None
    variant = variant_for(config.arch, config.student_model, dataset.input_size)
    variant |= run.teacher.variant if config.init == "teacher" else {}
    return run.students(partial(build_student, config, len(dataset.classes), **variant))


def describe_run(run: Run, learner: Students, start: str, budget: list[list[float]] | None) -> Meta:
    """The metadata of this run's checkpoints and of the network that it exports."""
    config, recorded = run.config, run.config.recorded()
    return Meta(
        arch=recorded["arch"],
        model=config.trained_model,
        conv=config.conv,
        groups=config.groups,
        pruned_num=count_cheap(learner.students[0]),
        build=learner.students[0].variant,
        rule=RULE,
        start=start,
        budget=budget,
        **run.dataset.meta,
        inputs=Inputs.of(run.dataset, config.data_dir, run.teacher),
        config=recorded,
    )


def print_test(config: Config) -> None:
    """Print the test accuracies of the pretrained teacher and of the networks of a training checkpoint, if given.

    Raises:
        UserError: neither is given; a damaged file; flags that contradict it.
    """
    path = config.job_dir / BEST if config.resume in (None, RESUME_LAST) else config.resume
    found = {}
    if config.resume or path.exists():
        content = checkpoint.load(path, TrainingCheckpoint)
        students, meta = checkpoint.all_students(path, content, config.arch)
        config = options.for_test(config, meta.config | {"arch": meta.arch}, path)
        run = prepare(config, trained=(path, meta))
        learner = place(run.learner(students), run.device)
        load_weights(learner, content.model, str(path))
        several = METHODS[config.method].names(len(students))
        names = [config.teacher_model] if config.pretrain else [*several, ONLINE_TEACHER]
        found = dict(zip(names, evaluate(learner, run.loaders.test).accuracies(), strict=False))
    elif config.teacher_dir:
        run = prepare(with_networks(options.settle_main(config)))
    else:
        raise UserError(f"--test_only finds no checkpoint {path}: give --job_dir, --resume FILE or --teacher_dir")
    if run.teacher:
        found = {"pretrained teacher": accuracy(run.teacher, run.loaders.test)} | found
    for name, value in found.items():
        print(f"{name}: {value} on the test set")


if __name__ == "__main__":
    run_script(lambda: main(CONFIG))
