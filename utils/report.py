"""The results of a run: the exported network, report.md, report.json and the table that is printed last."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model.online import Ensemble
from utils import checkpoint, export, options, tables
from utils.checkpoint import Meta
from utils.cost import count, forward_pass, latency
from utils.device import describe
from utils.engine import Trainer
from utils.errors import log
from utils.files import atomic_write, to_plain
from utils.job import read_metrics
from utils.methods import METHODS
from utils.metrics import Scores, accuracy, evaluate
from utils.setup import Run, standard_network
from utils.tables import BATCHES, MARK, ONNX, PYTORCH, SPLITS, UNSTEADY, ClassAccuracy, Row

MOST_CONFUSED = 100  # classes up to which report.json holds the confusion matrix


def results(run: Run, trainer: Trainer) -> tuple[list[Row], Scores]:
    """Evaluate the networks of a run, in which the standard one is untrained if there is no pretrained teacher.

    Returns:
        The networks, the standard one first, and the scores on the test set, which is looked at only here.
    """
    config, learner, best, size = run.config, trainer.learner, trainer.best_student, run.dataset.input_size
    splits, name = (run.loaders.val, run.loaders.test), f"{config.teacher_model}, standard"
    scores = [evaluate(learner, batches, confusion_of=trainer.best.student) for batches in splits]
    val, test = (split.accuracies() for split in scores)
    if config.pretrain:
        return [Row(name, "standard", count(best, size), *val, *test, best, exported=True)], scores[1]
    standard = run.teacher or standard_network(config, run.dataset)  # to compare costs with
    known = [accuracy(standard, batches) for batches in splits] if run.teacher else [None, None]
    rows = [Row(name, "standard", count(standard, size), *known, standard)]
    method, count_of = METHODS[config.method], len(learner.students)
    names, mark = method.names(count_of), ", best" if len(method.candidates(count_of)) == count_of else ""
    for i, student in enumerate(learner.students):
        name, network = (f"{names[i]}{mark}", best) if student is best else (names[i], None)
        rows.append(Row(name, "student", count(student, size), val[i], test[i], network, exported=student is best))
    if len(val) > len(learner.students):
        rows.append(Row(tables.ONLINE_TEACHER, "online_teacher", count(learner, size), val[-1], test[-1], learner))
    return rows, scores[1]


def publish(run: Run, trainer: Trainer, meta: Meta, rows: list[Row], test: Scores) -> None:
    """Export the best student, and the online teacher if --export_teacher asks for it; write and print the report.

    Args:
        meta: of the run's checkpoints.
        rows, test: as `results` returns them; the exported row has its network.
    """
    job, config, dataset = run.job, run.config, run.dataset
    dataset.skipped.share()
    if not job.writes:
        return
    standard, (exported,) = rows[0], [row for row in rows if row.exported]
    meta = replace(meta, networks=[row.summary() for row in rows])
    if config.export_teacher:
        (teacher,) = (row for row in rows if row.role == "online_teacher")
        ensemble = {"method": config.method, "num_students": len(teacher.network.students)}
        of_teacher = replace(meta, accuracy=teacher.accuracies(), ensemble=ensemble)
        log.info(f"exported {job.export_teacher}, the online teacher")
        network = Ensemble(teacher.network)
        checkpoint.export(job.export_teacher, network, of_teacher)
        deploy(run, job.export_teacher, network, of_teacher)
    meta = replace(meta, accuracy=exported.accuracies())
    checkpoint.export(job.export, exported.network, meta)
    deployment = deploy(run, job.export, exported.network, meta)
    pretrained = standard.val.top1 if standard.val and not standard.exported else None
    metrics = read_metrics(job.metrics)
    tables.draw(job.curves, (11, 4.2), tables.plot_curves, metrics, trainer.best, pretrained)
    if meta.budget:
        tables.draw(job.budget, (6, 4.2), tables.plot_budget, meta.budget, meta.pruned_num)

    measure(rows, meta, deployment.onnx, run.device)
    sentence = ""
    if not standard.exported:
        cheap = f" ({config.conv})" if config.pruned_num else ""
        sentence = tables.verdict(rows, f"{config.teacher_model} -> {config.student_model}{cheap}")
    classes = by_class(test.confusion, dataset.classes)
    command, defaults = options.command(config)
    environment = trainer.environment | {"device": describe(run.device), "command": command}
    if deployment.onnx:
        environment["onnxruntime"] = export.runtime_version()
    notes = _notes(run, trainer, rows, deployment, meta.start)
    shown = [tables.overview(rows, "val", "test"), tables.measurements(rows), tables.classes(classes)]
    parts = [f"# {job.export.name}", sentence, *map(tables.markdown, shown)]
    if meta.budget:
        parts.append(tables.markdown(tables.budget(meta.budget)))
        parts.append(f"![accuracy before training over MACs]({job.budget.name})")
    parts.append("\n".join(f"- {note}" for note in notes))
    parts.append(f"To train it again, give another `--job_dir` or add `--reset`:\n\n```sh\n{command}\n```")
    parts.append(f"The other flags had these values: `{defaults}`")
    with atomic_write(job.report, "w") as file:
        file.write("\n\n".join(filter(None, parts)) + "\n")
    content = {
        "networks": tables.as_json(rows),
        "summary": sentence,
        "best": to_plain(trainer.best),
        "notes": notes,
        "data": str(dataset),
        "start": meta.start,
        "seconds": trainer.seconds,
        "exported": deployment.as_json(),
        "skipped_images": dataset.skipped.reasons,
        "classes": [entry._asdict() for entry in classes],
        "confusion": test.confusion.tolist() if len(classes) <= MOST_CONFUSED else None,
        "disagreement": test.disagreement,
        "meta": to_plain(meta),
        "environment": environment,
    }
    with atomic_write(job.report_json, "w") as file:
        json.dump(content, file, indent=2)
    printed = [tables.plain(tables.overview(rows, "test")), sentence, f"exported {job.export}; more in {job.report}"]
    log.info("\n" + "\n\n".join(filter(None, printed)))


def deploy(run: Run, exported: Path, network: nn.Module, meta: Meta) -> export.Deployment:
    """Write a network in the formats of --export beside its file `exported`, and log how it went."""
    deployment = export.write(exported, network, to_plain(meta), run.config.export, run.loaders.test)
    files = [f"also exported {', '.join(map(str, deployment.files))}"] if deployment.files else []
    for line in (*files, *deployment.notes(), *deployment.doubts()):
        log.info(line)
    return deployment


def measure(rows: Sequence[Row], meta: Meta, onnx: bytes | None, device: torch.device) -> None:
    """Fill in latencies, and sizes of the files of the standard and the exported network.

    Args:
        onnx: content of the exported network's ONNX file.
    """
    standard, (exported,) = rows[0], [row for row in rows if row.exported]
    contents = [(exported, onnx)] if onnx else []
    if onnx and standard is not exported:
        plain = to_plain(meta)
        with suppress(Exception):  # a network of the user's own; the student lacks what cannot be traced
            contents.insert(0, (standard, export.to_onnx(export.fold(standard.network, plain), plain)))
    for row, content in contents:
        row.onnx_bytes = len(content)
    for row in (standard, exported):
        row.file_bytes = checkpoint.exported_size(row.network, meta)
    sessions = [(row, export.session(content)) for row, content in contents]
    for batch in BATCHES:
        images = torch.randn(batch, *meta.input_size)
        networks = [(row, forward_pass(row.network, images, device)) for row in rows if row.network]
        deployed = [(row, partial(session, images.numpy())) for row, session in sessions]
        for runtime, calls in ((PYTORCH, networks), (ONNX, deployed)):  # one after the other: they share the cores
            found = latency([call for _, call in calls], device)
            for (row, _), time in zip(calls, found, strict=True):
                row.latencies[runtime, batch] = time


def by_class(counts: np.ndarray, classes: Sequence[str]) -> list[ClassAccuracy]:
    """Accuracy on each class from a confusion matrix (K, K)."""
    totals, right = counts.sum(1).tolist(), counts.diagonal().tolist()
    entries = zip(classes, totals, right, strict=True)
    return [ClassAccuracy(name, total, 100 * hits / total if total else None) for name, total, hits in entries]


def _notes(run: Run, trainer: Trainer, rows: Sequence[Row], deployment: export.Deployment, start: str) -> list[str]:
    """Notes on how the numbers were measured, and on numbers that are not reliable."""
    dataset, environment = run.dataset, trainer.environment
    chosen = f"on {len(dataset.val):,} validation images; the test set was evaluated once, after training"
    if dataset.val is dataset.test:
        chosen = "on the TEST set (--val_size 0), as the released code did: the test accuracy of the best is optimistic"
    notes = [
        str(dataset),
        *deployment.doubts(),
        *dataset.doubts(),
        *not_finite(rows),
        *unsteady(rows),
        *deployment.notes(),
        f"{'Students' if len(trainer.learner.students) > 1 else 'The network'} started {start}.",
        f"Chosen at epoch {trainer.best.epoch}, {chosen}.",
        "Accuracies and latencies are of float32 networks; latency is the median of repeated passes on "
        f"{describe(run.device)}, torch {environment['torch']}.",
        f"Computed with {environment['execution']}, trained in {environment['precision']}.",
    ]
    if deployment.onnx:
        version, threads = export.runtime_version(), torch.get_num_threads()
        notes.append(f"ONNX Runtime {version} is timed on the CPU, in {threads} threads.")
    return notes


def not_finite(rows: Sequence[Row]) -> list[str]:
    """A note for each network with non-finite logits."""
    return [
        f"The logits of {row.name} are not finite on some {SPLITS[split]} images, so it has no accuracy."
        for row in rows
        for split in row.not_finite
    ]


def unsteady(rows: Sequence[Row]) -> list[str]:
    """A note that explains the mark of unsteady latencies, if there are any."""
    spread = max((latency.spread for row in rows for latency in row.latencies.values()), default=0)
    note = (
        f"Latencies marked {MARK} vary by more than {UNSTEADY:.0%} of their median between passes, the worst by "
        f"{spread:.0%}: the machine was busy, or its clock changed; measure them again before relying on them."
    )
    return [note] if spread > UNSTEADY else []
