"""What a run achieved: report.md, report.json and the table that is printed last."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data.loader import Batches
from data.sources import DataSet
from model.online import Ensemble
from utils import checkpoint, export, tables
from utils.cost import Cost, forward_pass, latency
from utils.curves import draw_curves
from utils.device import describe
from utils.engine import Trainer
from utils.evaluation import Accuracy, confusion
from utils.files import atomic_write
from utils.job import Job

ONLINE_TEACHER = "online teacher"
MOST_LISTED, WORST_LISTED = 20, 10  # classes in report.md: all of so few, else the worst
MOST_CONFUSED = 100  # classes up to which report.json holds the confusion matrix


class Row(NamedTuple):
    """A network in a report; its accuracies are None where unknown.

    Its latency is measured if it is given, and if its ONNX file is, in ONNX Runtime, too.

    Attributes:
        role: "standard", "student", "before" (the student that finetune.py refined) or "online_teacher".
    """

    name: str
    role: str
    cost: Cost
    val: Accuracy | None = None
    test: Accuracy | None = None
    network: nn.Module | None = None
    file_bytes: int | None = None
    onnx: bytes | None = None


class Results(NamedTuple):
    """The networks of a run, the standard one first; the best student has its network.

    Attributes:
        disagreement: share of the test images, in %, for which two students give different classes, over all pairs.
    """

    rows: list[Row]
    disagreement: float | None = None


def standard_name(model: str) -> str:
    return f"{model}, standard"


def publish(
    job: Job,
    results: Results,
    trainer: Trainer,
    meta: dict[str, Any],
    dataset: DataSet,
    device: torch.device,
    test: Batches,
    formats: Sequence[str],
) -> None:
    """Export the best student and write and print what the run achieved.

    Args:
        test: the images to compare an ONNX file on.
        formats: to export to, besides the one of this program.
    """
    rows, best = results.rows, trainer.best_student
    counts = confusion(best, test, len(dataset.classes))
    dataset.skipped.share()
    if not job.writes:
        return
    chosen = next(i for i, row in enumerate(rows) if row.network is best)
    meta = described(meta, rows, rows[chosen])
    checkpoint.export(job.export, best, meta)
    draw_curves(job, trainer.best, rows[0].val.top1 if chosen and rows[0].val else None)
    deployment = export.write(job.export, best, meta, formats, test)
    for line in deployment.lines():
        job.logger.info(line)
    table = compare(_with_files(rows, chosen, meta, deployment), dataset.input_size, device)
    doubts = [*deployment.doubts(), *_skipped(dataset), *repeated(dataset), *_unseen(dataset)]
    doubts += [*_not_finite(rows), *_unsteady(table)]
    sentence = tables.verdict(table, chosen, meta) if chosen else ""
    classes = by_class(counts, dataset.classes)
    answers = {"classes": classes, "confusion": counts.tolist() if len(classes) <= MOST_CONFUSED else None}
    answers["disagreement"] = results.disagreement
    for i, row in enumerate(table):
        row["exported"] = i == chosen
    _write(job, table, chosen, sentence, answers, deployment, doubts, trainer, meta, dataset, device)
    printed = [tables.summary(table), *filter(None, [sentence]), f"exported {job.export}; more in {job.report}"]
    job.logger.info("\n" + "\n\n".join(printed))


def publish_teacher(job: Job, results: Results, meta: dict[str, Any], test: Batches, formats: Sequence[str]) -> None:
    """Export the online teacher as one network, in the file of this program and in the other `formats`."""
    if not job.writes:
        return
    (row,) = (row for row in results.rows if row.role == "online_teacher")
    ensemble = {"method": meta["config"]["method"], "num_students": len(row.network.students)}
    meta = described(meta, results.rows, row) | {"ensemble": ensemble}
    network = Ensemble(row.network)
    checkpoint.export(job.export_teacher, network, meta)
    for line in (
        f"exported {job.export_teacher}, the online teacher",
        *export.write(job.export_teacher, network, meta, formats, test).lines(),
    ):
        job.logger.info(line)


def described(meta: dict[str, Any], rows: Sequence[Row], exported: Row) -> dict[str, Any]:
    """The metadata of an exported network: that of the run, with the accuracies and costs of its networks."""
    networks = [{"name": row.name, "role": row.role, **row.cost._asdict(), **_accuracies(row)} for row in rows]
    return meta | {"accuracy": _accuracies(exported), "networks": networks}


def _with_files(rows: Sequence[Row], chosen: int, meta: dict[str, Any], deployment: export.Deployment) -> list[Row]:
    """The rows, with the files of the standard network and of the chosen one."""
    rows = list(rows)
    for i in {0, chosen}:
        size, onnx = checkpoint.exported_size(rows[i].network, meta), None
        if deployment.onnx:
            onnx = deployment.onnx if i == chosen else export.standard_onnx(rows[i].network, meta)
        rows[i] = rows[i]._replace(file_bytes=size, onnx=onnx)
    return rows


def compare(rows: Sequence[Row], input_size: Sequence[int], device: torch.device) -> tables.Table:
    """The rows as plain values, with latencies (ms by batch size), their spread, and the ratio of each to the first's.

    Ratios say how many times smaller, cheaper and faster a network is: above 1 is better.
    """
    table = [{"name": row.name, "role": row.role, **_accuracies(row), **row.cost._asdict()} for row in rows]
    sessions = {}
    for i, row in enumerate(rows):
        if row.file_bytes:
            table[i]["file_bytes"] = row.file_bytes
        if row.onnx:
            table[i]["onnx_bytes"] = len(row.onnx)
            sessions[i] = export.session(row.onnx)
    for batch in tables.LATENCY_BATCHES:
        images = torch.randn(batch, *input_size)
        networks = {i: forward_pass(row.network, images, device) for i, row in enumerate(rows) if row.network}
        _time(table, networks, str(batch), "", device)
        if sessions:
            passes = {i: partial(run, images.numpy()) for i, run in sessions.items()}
            _time(table, passes, str(batch), "onnx_", device)
    for entry in table:
        entry["ratios"] = {key: table[0][key] / entry[key] for key in tables.COSTS if key in entry and key in table[0]}
    return table


def _time(
    table: tables.Table, passes: dict[int, Callable[[], object]], batch: str, runtime: str, device: torch.device
) -> None:
    """Put into the table what the passes of its networks take; of one runtime, for two would fight for the cores."""
    for i, time in zip(passes, latency(list(passes.values()), device), strict=True):
        table[i] |= {f"{runtime}latency_{batch}": time.median, f"{runtime}spread_{batch}": time.spread}


def _write(
    job: Job,
    table: tables.Table,
    chosen: int,
    sentence: str,
    answers: dict[str, Any],
    deployment: export.Deployment,
    doubts: list[str],
    trainer: Trainer,
    meta: dict[str, Any],
    dataset: DataSet,
    device: torch.device,
) -> None:
    best, environment = trainer.best, trainer.environment | {"device": describe(device), "command": sys.argv}
    notes = [
        headline(dataset),
        *doubts,
        *deployment.notes(),
        f"{'Students' if len(trainer.learner.students) > 1 else 'The network'} started {meta['start']}.",
        f"Chosen at epoch {best['epoch']}, {_selection(dataset)}.",
        "Accuracies and latencies are of float32 networks; latency is the median of repeated passes on "
        f"{environment['device']}, torch {environment['torch']}.",
        f"Run by {environment['execution']}, trained in {environment['precision']}.",
    ]
    if deployment.onnx:
        environment["onnxruntime"] = export.runtime_version()
        notes.append(
            f"ONNX Runtime {environment['onnxruntime']} is timed on the CPU, in {torch.get_num_threads()} threads."
        )
    flags = " ".join(
        f"`--{name} {value}`" for name, value in meta["config"].items() if value is not None and value is not False
    )
    parts = [sentence and [sentence], tables.accuracy_table(table), tables.cost_table(table)]
    parts += [tables.deployment_table(table, chosen), tables.class_table(answers["classes"], MOST_LISTED, WORST_LISTED)]
    parts += [[f"- {note}" for note in (*notes, flags)]]
    text = [line for part in ([f"# {job.export.name}"], *filter(None, parts)) for line in (*part, "")]
    with atomic_write(job.report, "w") as file:
        file.write("\n".join(text))
    content = {"networks": table, "summary": sentence, "best": best, "notes": notes}
    content |= {"data": notes[0], "start": meta["start"], "seconds": trainer.seconds}
    content |= {"exported": deployment.as_json(), "skipped_images": dataset.skipped.reasons, **answers}
    content |= {"meta": meta, "environment": environment}
    with atomic_write(job.report_json, "w") as file:
        json.dump(content, file, indent=2)


def by_class(counts: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each class with its number of images and the accuracy on them in %, None without any, from a confusion matrix."""
    return [
        {"name": name, "images": int(row.sum()), "accuracy": 100 * int(row[i]) / int(row.sum()) if row.any() else None}
        for i, (name, row) in enumerate(zip(classes, counts, strict=True))
    ]


def headline(dataset: DataSet) -> str:
    """The data in one line."""
    counts = " / ".join(f"{len(split):,}" for split in (dataset.train, dataset.val, dataset.test))
    size = " x ".join(map(str, dataset.input_size))
    return f"{dataset.name}: {len(dataset.classes)} classes, {counts} training / validation / test images of {size}"


def repeated(dataset: DataSet) -> list[str]:
    """A note for each split with images that were trained on."""
    return [
        f"{count:,} of {len(dataset.train):,} training images are pixel by pixel in the {name} set, too: accuracies "
        "there are in part on images that were trained on."
        for name, count in dataset.repeated.items()
        if count
    ]


def _skipped(dataset: DataSet) -> list[str]:
    """A note of the images that could not be read, if there are any."""
    reasons, total = dataset.skipped.reasons, dataset.skipped.total
    if not reasons:
        return []
    path, reason = min(reasons.items())
    count = f"{len(reasons):,} of {total:,} images"
    return [f"Left out because they cannot be read: {count}, such as {path} ({reason})."]


def _unseen(dataset: DataSet) -> list[str]:
    """A note of each split that lacks images of a class."""
    notes = []
    for name, split in dataset.splits.items():
        counts = np.bincount(split.targets, minlength=len(dataset.classes))
        if missing := [dataset.classes[i] for i in np.flatnonzero(counts == 0)]:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            notes.append(f"No {name} image is of these classes, about which its accuracies say nothing: {listed}.")
    return notes


def _not_finite(rows: Sequence[Row]) -> list[str]:
    """A note for each network with non-finite logits."""
    splits = {"validation": "val", "test": "test"}
    broken = [(row.name, split) for row in rows for split, key in splits.items() if _is_nan(getattr(row, key))]
    return [
        f"The logits of {name} are not finite on some {split} images: it has no accuracy." for name, split in broken
    ]


def _unsteady(table: tables.Table) -> list[str]:
    """A note that explains the mark of unsteady latencies, if there are any."""
    spreads = [row.get(key.replace("latency", "spread"), 0) for row in table for key in tables.LATENCIES]
    spread = max(spreads, default=0)
    if spread <= tables.UNSTEADY:
        return []
    return [
        f"Latencies marked {tables.MARK} vary by more than {tables.UNSTEADY:.0%} of their median between passes, the "
        f"worst by {spread:.0%}: the machine was busy, or its clock changed; measure them again before relying on them."
    ]


def _accuracies(row: Row) -> dict[str, float | None]:
    """ "val" and "test", top-1 in %, and "val_top5" and "test_top5" where there are more than ten classes."""
    values = {}
    for split, accuracy in (("val", row.val), ("test", row.test)):
        known = accuracy is not None and not _is_nan(accuracy)
        values[split] = accuracy.top1 if known else None
        if known and accuracy.top5 is not None:
            values[f"{split}_top5"] = accuracy.top5
    return values


def _is_nan(accuracy: Accuracy | None) -> bool:
    return accuracy is not None and math.isnan(accuracy.top1)


def _selection(dataset: DataSet) -> str:
    if dataset.val is dataset.test:
        return "on the TEST set (--val_size 0), as the released code did: the test accuracy of the best is optimistic"
    return f"on {len(dataset.val):,} validation images; the test set was looked at once, after training"
