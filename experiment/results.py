"""RESULTS.md: tables and pictures of what experiment/study.py has recorded."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiment.studies import STUDIES, Study, Table
from utils.files import atomic_write

Record = dict[str, Any]
Groups = dict[str, list[Record]]  # by variant

INTRODUCTION = """# Results

Written by `python experiment/study.py STUDY`, which trains what the tables show; `python experiment/study.py` writes
them again from the records of the runs, results/STUDY.jsonl.

Test accuracy, top-1 in %: mean ± standard error over the n seeds. "Exported" is the student that is exported, chosen
among the students and epochs of a run by validation accuracy. "Mean" is the mean of all students of a run; choosing one
of several favors "exported", but not "mean", over methods that train one student. The test set was evaluated once,
after training. A difference is stated with the sum of the two standard errors.
"""
LOSSLESS = """
Images are read with `--dataset folder`: the same images, classes and augmentation as torchvision's data set of the same
name. Mean and standard deviation are those of the training set (for CIFAR-10, the released recipe divides by 0.2023 …
instead of 0.2470 …), and the images are in another order, so that the validation split has other members.
"""


class Mean(NamedTuple):
    """Mean and standard error of n values; the error is NaN for n = 1."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        values = list(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")


def exported(record: Record) -> float:
    return record["test"]


def mean_student(record: Record) -> float:
    return statistics.fmean(student["test"] for student in record["students"] or [record])


def online_teacher(record: Record) -> float:
    return record["online_teacher"]["test"]


def records_file(out: Path, study: str) -> Path:
    return out / "results" / f"{study}.jsonl"


def networks_folder(out: Path, study: str) -> Path:
    return out / "results" / "students" / study


def read_records(out: Path, study: str) -> list[Record]:
    path = records_file(out, study)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_results(out: Path) -> None:
    """Write RESULTS.md and its pictures from all the records in `out`."""
    text = [INTRODUCTION]
    for name, study in STUDIES.items():
        if records := read_records(out, name):
            text += _section(name, study, records, out / "results")
    with atomic_write(out / "RESULTS.md", "w") as file:
        file.write("\n".join(text))


def _section(name: str, study: Study, records: list[Record], folder: Path) -> list[str]:
    keys = ("device", "execution", "precision", "torch")
    hardware = sorted({", ".join(e[key] for key in keys if key in e) for e in (r["environment"] for r in records)})
    where = " --data_dir PATH" if study.data else ""
    text = [f"## {study.title}", "", f"`python experiment/study.py {name}{where}` with the flags `{study.flags}`."]
    text += [LOSSLESS] if study.data else [""]
    text += [f"Trained on {'; '.join(hardware)}.", ""]
    for table in study.tables:
        groups = grouped(records, table)
        if any(groups.values()):
            text += [f"### {table.title}", "", *_table(table, groups), ""]
            text += [*_comparisons(table, groups), ""]
    draw(study, records, folder / f"{name}.png")
    return [*text, f"![test accuracy against parameters](results/{name}.png)", ""]


def grouped(records: list[Record], table: Table) -> Groups:
    """The records of each row of a table."""
    own = [record for record in records if record["table"] == table.key]
    return {row.variant: [record for record in own if record["variant"] == row.variant] for row in table.rows}


def trained(records: Iterable[Record]) -> list[Record]:
    """The records of runs that did not diverge."""
    return [record for record in records if "diverged" not in record]


def _table(table: Table, groups: Groups) -> list[str]:
    some = next(record for group in groups.values() for record in trained(group))
    top5 = "test_top5" in some
    title = "exported top-1" if top5 else "exported"
    header = ["method", "N", title, *(["top-5"] if top5 else []), "mean", "online teacher", "disagree", "n"]
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    for row in table.rows:
        done, count = trained(groups[row.variant]), len(groups[row.variant])
        if not count:
            continue
        number = str(len(done)) + (f", {count - len(done)} diverged" if len(done) < count else "")
        if not done:
            lines.append([row.title, "", *[""] * (len(header) - 3), number])
            continue
        students = done[0]["settings"]["num_students"]
        cells = [row.title, str(students), _mean(exported, done)]
        if top5:
            cells.append(_mean(lambda record: record["test_top5"], done))
        cells.append(_mean(mean_student, done) if students > 1 else "")
        cells.append(_mean(online_teacher, done) if done[0]["online_teacher"] else "")
        cells.append(_mean(lambda record: record["disagreement"], done) if done[0].get("disagreement") else "")
        lines.append([*cells, number])
    return [f"| {' | '.join(line)} |" for line in lines]


def _mean(value: Callable[[Record], float], records: list[Record]) -> str:
    return str(Mean.of(map(value, records)))


def _comparisons(table: Table, groups: Groups) -> list[str]:
    """What a variant gains over another, where both have been trained: exported students, and means of students."""
    titles = {row.variant: row.title for row in table.rows}
    lines = ["| difference, points | exported | mean |", "|---|--:|--:|"]
    for ours, theirs in table.compared:
        pair = trained(groups[ours]), trained(groups[theirs])
        if all(pair):
            cells = [difference(*(Mean.of(map(value, group)) for group in pair)) for value in (exported, mean_student)]
            lines.append(f"| {titles[ours]}, minus {titles[theirs]} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def difference(ours: Mean, theirs: Mean) -> str:
    errors = ours.error + theirs.error
    return f"{ours.mean - theirs.mean:+.2f}" + ("" if math.isnan(errors) else f" ± {errors:.2f}")


def draw(study: Study, records: list[Record], path: Path) -> None:
    """One panel a table: accuracy of the networks against their parameters."""
    tables = {table: groups for table in study.tables if any((groups := grouped(records, table)).values())}
    figure = Figure(figsize=(6.2 * len(tables), 5.6), layout="constrained")
    for axes, (table, groups) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        _draw_table(axes, table, groups)
    figure.suptitle(f"{study.title}: mean and standard error over seeds", fontsize=11)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_table(axes: Axes, table: Table, groups: Groups) -> None:
    points = []  # (parameters, accuracy, marker, color, label)
    for i, row in enumerate(table.rows):
        if done := trained(groups[row.variant]):
            marker, online = "*" if done[0]["conv"] is None else "o", done[0]["online_teacher"] or {}
            points.append((done[0]["params"], Mean.of(map(exported, done)), marker, f"C{i % 10}", row.title))
            if "params" in online:
                accuracy, label = Mean.of(map(online_teacher, done)), f"{row.title}: online teacher"
                points.append((online["params"], accuracy, "D", f"C{i % 10}", label))
    for size, mean, marker, color, label in points:
        group = [point[-1] for point in points if point[0] == size]
        place = size * 1.05 ** (group.index(label) - (len(group) - 1) / 2)  # beside each other, around their tick
        error = 0 if math.isnan(mean.error) else mean.error
        axes.errorbar(place, mean.mean, error, fmt=marker, markersize=6, capsize=2, color=color, label=label)
    sizes = sorted({size for size, *_ in points})
    axes.set(title=table.title, xlabel="parameters", ylabel="test accuracy, top-1 %", xscale="log")
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.set_xticks(sizes, [f"{size / 1e3:.1f} k" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
