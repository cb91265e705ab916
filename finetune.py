"""Refine a compressed student and export the better of before and after.

    python finetune.py --refine experiment/digits/resnet_pruned_18.pt --pruned --job_dir experiment/digits_refined
    python finetune.py --refine experiment/digits/checkpoint/last.pt --job_dir experiment/digits_refined

--refine is an exported student with --pruned, and otherwise a training checkpoint, whose best student is refined.
The file determines the network and, unless flags do, the data.
"""

from utils import options
from utils.errors import UserError, guard
from utils.interruption import interruption

if __name__ == "__main__":
    guard()
    interruption.catch()
    CONFIG = options.parse("finetune")  # before the imports below, which take seconds: --help and typos answer at once

import copy
from dataclasses import replace

from torch import nn

from model import check_teacher
from model.online import Students
from utils import checkpoint, report
from utils.checkpoint import Inputs, Meta
from utils.config import Config
from utils.cost import check_fits, count
from utils.engine import Trainer
from utils.metrics import Scores, accuracy
from utils.setup import Run, prepare, run_script
from utils.tables import Row, read_row
from utils.teacher import check_unseen


def main(config: Config) -> None:
    load = checkpoint.load_network if config.pruned else checkpoint.best_student
    student, source = load(config.refine, config.arch)
    if source.ensemble and not config.test_only:
        raise UserError(
            f"{config.refine} is an online teacher, which can be evaluated and exported: give --test_only, too"
        )
    config = options.for_refinement(config, source)
    check_teacher(config.arch, config.teacher_model)
    run = prepare(config, trained=(config.refine, source))
    check_fits(student, str(config.refine), run.dataset.input_size, len(run.dataset.classes))
    before = copy.deepcopy(student).to(run.device)
    if config.test_only:
        print(f"{config.refine}: {accuracy(before, run.loaders.test)} on the test set")
        export_alone(run, before, replace(source, **run.dataset.meta))
        return
    check_unseen(source, run.dataset, config, config.refine)
    trainer = run.trainer(Students([student]))
    meta = describe_run(run, source, before)
    run.train(trainer, meta, [f"refining {config.refine}"], keep_initial=True)

    report.publish(run, trainer, meta, *results(run, trainer, before, source))
    run.end()


def describe_run(run: Run, source: Meta, before: nn.Module) -> Meta:
    """The metadata of this run's checkpoints and of the student that it exports.

    Args:
        source: metadata of the file with the student `before`.
    """
    return replace(
        source,
        **run.dataset.meta,
        config=run.config.recorded(),
        history=[*(source.history or []), source.config],
        start=f"from {run.config.refine}",
        inputs=Inputs.of(run.dataset, run.config.data_dir, run.teacher, before),
        accuracy=None,  # the refined student gets its own
    )


def export_alone(run: Run, student: nn.Module, meta: Meta) -> None:
    """Write the student to the job_dir in the formats of --export, if there are any.

    Raises:
        UserError: it cannot be exported, or the folder not be written.
    """
    job = run.job
    if not (run.config.export and job.writes):
        return
    job.check_writable()
    job.folder.mkdir(parents=True, exist_ok=True)
    exported = job.export_teacher if meta.ensemble else job.export
    deployment = report.deploy(run, exported, student, meta)
    if deployment.failures:
        raise UserError("; ".join(deployment.failures))


def results(run: Run, trainer: Trainer, before: nn.Module, source: Meta) -> tuple[list[Row], Scores]:
    """The student before and after, beside the networks of the run that it comes from, the standard one first."""
    now, then, known = run.config.recorded(), source.config, {}
    if all(now[flag] == then[flag] for flag in ("dataset", "data_dir", "labels", "val_size")):
        known = {row.role: row for row in map(read_row, source.networks or [])}
    rows, test = report.results(run, trainer)
    standard, refined = rows
    refined.name = "student, refined"
    if not run.teacher and "standard" in known and run.config.teacher_model == then["teacher_model"]:
        standard.val, standard.test = known["standard"].val, known["standard"].test
    accuracies = [accuracy(before, batches) for batches in (run.loaders.val, run.loaders.test)]
    rows.insert(1, Row("student, before", "before", count(before, run.dataset.input_size), *accuracies, before))
    if "online_teacher" in known:
        rows.append(known["online_teacher"])
    return rows, test


if __name__ == "__main__":
    run_script(lambda: main(CONFIG))
