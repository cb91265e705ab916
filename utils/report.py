"""What a run achieved: report.md, report.json and the table that is printed last."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data.sources import DataSet
from utils import checkpoint
from utils.cost import Cost, latency
from utils.curves import draw_curves
from utils.device import describe
from utils.engine import Trainer
from utils.files import atomic_write
from utils.job import Job

LATENCY_BATCHES = (1, 256)
UNSTEADY = 0.5  # spread of a latency from which on it is marked
MARK = "(unsteady)"
ONLINE_TEACHER = "online teacher"
COSTS = ("params", "macs", *(f"latency_{batch}" for batch in LATENCY_BATCHES))


class Row(NamedTuple):
    """A network in a report; accuracies are top-1 in %, None where unknown, NaN where its logits are not finite.

    Its latency is measured if it is given.
    """

    name: str
    cost: Cost
    val: float | None = None
    test: float | None = None
    network: nn.Module | None = None


def standard_name(model: str) -> str:
    return f"{model}, standard"


def publish(
    job: Job, rows: Sequence[Row], trainer: Trainer, meta: dict[str, Any], dataset: DataSet, device: torch.device
) -> None:
    """Export the best student and write and print what the run achieved.

    Args:
        rows: the standard network first; the best student's has its network.
    """
    if not job.writes:
        return
    best = trainer.best_student
    accuracy = next(_accuracies(row) for row in rows if row.network is best)
    networks = [{"name": row.name, **row.cost._asdict(), **_accuracies(row)} for row in rows]
    meta = meta | {"accuracy": accuracy, "networks": networks}
    checkpoint.export(job.export, best, meta)
    draw_curves(job, trainer.best, rows[0].val if rows[0].network is not best else None)
    table = compare(rows, dataset.input_size, device)
    doubts = [*_skipped(dataset), *_unseen(dataset), *_not_finite(rows), *_unsteady(table)]
    _write(job, table, doubts, trainer, meta, dataset, device)
    job.logger.info(f"\n{summary(table)}\n\nexported {job.export}; more in {job.report}")


def compare(rows: Sequence[Row], input_size: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """The rows as plain values, with latencies (ms by batch size), their spread, and the ratio of each to the first's.

    Ratios say how many times smaller, cheaper and faster a network is: above 1 is better.
    """
    table = [{"name": row.name, **_accuracies(row), **row.cost._asdict()} for row in rows]
    timed = [i for i, row in enumerate(rows) if row.network]
    for batch in LATENCY_BATCHES:
        times = latency([rows[i].network for i in timed], input_size, batch, device)
        for i, time in zip(timed, times, strict=True):
            table[i] |= {f"latency_{batch}": time.median, f"spread_{batch}": time.spread}
    for entry in table:
        entry["ratios"] = {key: table[0][key] / entry[key] for key in entry if key in COSTS}
    return table


def _write(
    job: Job,
    table: list[dict[str, Any]],
    doubts: list[str],
    trainer: Trainer,
    meta: dict[str, Any],
    dataset: DataSet,
    device: torch.device,
) -> None:
    best, execution = trainer.best, trainer.execution
    environment = {
        "device": describe(device), "execution": execution, "torch": torch.__version__, "command": sys.argv
    }  # fmt: skip
    notes = [
        headline(dataset),
        *doubts,
        f"Chosen at epoch {best['epoch']}, {_selection(dataset)}.",
        "Accuracies and latencies are of float32 networks; latency is the median of repeated passes on "
        f"{environment['device']}, torch {environment['torch']}.",
        f"Run by {execution}, trained in {trainer.precision}.",
    ]
    flags = " ".join(
        f"`--{name} {value}`" for name, value in meta["config"].items() if value is not None and value is not False
    )
    text = [f"# {job.export.name}", "", *_accuracy_table(table), "", *_cost_table(table), ""]
    text += [*(f"- {note}" for note in (*notes, flags)), ""]
    with atomic_write(job.report, "w") as file:
        file.write("\n".join(text))
    content = {"networks": table, "best": best, "notes": notes, "skipped_images": dataset.skipped.reasons}
    content |= {"meta": meta, "environment": environment}
    with atomic_write(job.report_json, "w") as file:
        json.dump(content, file, indent=2)


def headline(dataset: DataSet) -> str:
    """The data in one line."""
    counts = " / ".join(f"{len(split):,}" for split in (dataset.train, dataset.val, dataset.test))
    size = " x ".join(map(str, dataset.input_size))
    return f"{dataset.name}: {len(dataset.classes)} classes, {counts} training / validation / test images of {size}"


def summary(table: list[dict[str, Any]]) -> str:
    """The table for a person at a terminal: accuracy, parameters, MACs."""
    cells = [("network", "test top-1, %", "parameters", "", "MACs", "")]
    for row in table:
        ratios = ("", "") if row is table[0] else (f"{_times(row, 'params')} smaller", f"{_times(row, 'macs')} fewer")
        cells.append((row["name"], _percent(row["test"]), f"{row['params']:,}", ratios[0], _mega(row), ratios[1]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


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
    splits = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    if dataset.val is dataset.test:
        del splits["validation"]
    notes = []
    for name, split in splits.items():
        counts = np.bincount(split.targets, minlength=len(dataset.classes))
        if missing := [dataset.classes[i] for i in np.flatnonzero(counts == 0)]:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            notes.append(f"No {name} image is of these classes, about which its accuracies say nothing: {listed}.")
    return notes


def _not_finite(rows: Sequence[Row]) -> list[str]:
    """A note of each network whose answers are no numbers."""
    splits = {"validation": "val", "test": "test"}
    broken = [(row.name, split) for row in rows for split, key in splits.items() if _is_nan(getattr(row, key))]
    return [
        f"The logits of {name} are not finite on some {split} images: it has no accuracy." for name, split in broken
    ]


def _unsteady(table: list[dict[str, Any]]) -> list[str]:
    """A note that explains the mark of unsteady latencies, if there are any."""
    spread = max((row.get(f"spread_{batch}", 0) for row in table for batch in LATENCY_BATCHES), default=0)
    if spread <= UNSTEADY:
        return []
    return [
        f"Latencies marked {MARK} vary by more than {UNSTEADY:.0%} of their median between passes, the worst by "
        f"{spread:.0%}: the machine was busy, or its clock changed; measure them again before relying on them."
    ]


def _accuracies(row: Row) -> dict[str, float | None]:
    return {key: None if _is_nan(value) else value for key, value in (("val", row.val), ("test", row.test))}


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)


def _selection(dataset: DataSet) -> str:
    if dataset.val is dataset.test:
        return "on the TEST set (--val_size 0), as the released code did: the test accuracy of the best is optimistic"
    return f"on {len(dataset.val):,} validation images; the test set was looked at once, after training"


def _accuracy_table(table: list[dict[str, Any]]) -> list[str]:
    lines = [f"| {row['name']} | {_percent(row['val'])} | {_percent(row['test'])} |" for row in table]
    return ["| top-1 accuracy, % | validation | test |", "|---|--:|--:|", *lines]


def _cost_table(table: list[dict[str, Any]]) -> list[str]:
    header = ["network", "parameters", "smaller", "MACs", "fewer"]
    header += [title for batch in LATENCY_BATCHES for title in (f"latency, batch {batch}", "faster")]
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    for row in table:
        if f"latency_{LATENCY_BATCHES[0]}" in row:  # the other students cost what the best one costs
            cells = [row["name"], f"{row['params']:,}", _times(row, "params"), _mega(row), _times(row, "macs")]
            for batch in LATENCY_BATCHES:
                mark = f" {MARK}" if row[f"spread_{batch}"] > UNSTEADY else ""
                cells += [f"{row[f'latency_{batch}']:.2f} ms{mark}", _times(row, f"latency_{batch}")]
            lines.append(cells)
    return [f"| {' | '.join(line)} |" for line in lines]


def _times(row: dict[str, Any], key: str) -> str:
    return f"{row['ratios'][key]:.2f}x"


def _mega(row: dict[str, Any]) -> str:
    return f"{row['macs'] / 1e6:.2f} M"


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f}"
