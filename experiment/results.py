"""RESULTS.md: tables and pictures of what experiment/study.py has recorded."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiment.studies import COMPARED, STUDIES, Study, Table
from utils.files import atomic_write
from utils.tables import draw, markdown

Record = dict[str, Any]
Groups = dict[str, list[Record]]  # by variant

TITLES = ("method", "N", "parameters", "exported", "top-5", "mean", "online teacher", "its parameters", "disagree", "n")

INTRODUCTION = """# Results

Written by `python experiment/study.py STUDY`, which trains what the tables show; `python experiment/study.py` writes
them again from the records of the runs, results/STUDY.jsonl.

Test accuracy, top-1 in %: mean ± standard error over the n seeds. "Exported" is the student that is exported, chosen
among the students and epochs of a run by validation accuracy. "Mean" is the mean of all students of a run; choosing one
of several favors "exported", but not "mean", over methods that train one student. "Top-5" is that of the exported
student; "disagree" is the share of the test images, in %, for which two students give different classes. The test set
was evaluated once, after training. A difference is stated with the sum of the two standard errors."""
LOSSLESS = """\
Images are read with `--dataset folder`: the same images, classes and augmentation as torchvision's data set of the same
name. Mean and standard deviation are those of the training set (for CIFAR-10, the released recipe divides by 0.2023 …
instead of 0.2470 …), and the images are in another order, so that the validation split has other members."""


class Mean(NamedTuple):
    """Mean and standard error of values; the error of a single one is NaN."""

    mean: float
    error: float

    @classmethod
    def of(cls, value: Callable[[Record], float], records: Iterable[Record]) -> "Mean":
        values = [value(record) for record in records]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)

    def __sub__(self, other: "Mean") -> "Mean":
        """The difference, with the sum of the two errors."""
        return Mean(self.mean - other.mean, self.error + other.error)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")


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
        file.write("\n\n".join(text) + "\n")


def _section(name: str, study: Study, records: list[Record], folder: Path) -> list[str]:
    keys = ("device", "execution", "precision", "torch")
    environments = [record["environment"] for record in trained(records)]
    hardware = sorted({", ".join(found[key] for key in keys if key in found) for found in environments})
    where = " --data_dir PATH" if study.data else ""
    text = [f"## {study.title}", f"`python experiment/study.py {name}{where}` with the flags `{study.flags}`."]
    text += [LOSSLESS] if study.data else []
    text += [f"Trained on {'; '.join(hardware)}."] if hardware else []
    for table in study.tables:
        groups = grouped(records, table)
        if any(groups.values()):
            text += filter(None, [f"### {table.title}", _table(table, groups), _comparisons(table, groups)])
        if any(map(trained, groups.values())):
            picture = f"{name}-{table.key}.png"
            draw(folder / picture, (9, 4.5), plot, f"{study.title}: {table.title}", table, groups, dpi=110)
            text.append(f"![test accuracy against parameters](results/{picture})")
    return text


def grouped(records: list[Record], table: Table) -> Groups:
    """The records of each row of a table."""
    own = [record for record in records if record["table"] == table.key]
    return {row.variant: [record for record in own if record["variant"] == row.variant] for row in table.rows}


def trained(records: Iterable[Record]) -> list[Record]:
    """The records of runs that did not diverge."""
    return [record for record in records if "diverged" not in record]


def _table(table: Table, groups: Groups) -> str:
    """A row for each variant with records; columns without any value are left out."""
    lines = []
    for row in table.rows:
        done, count = trained(groups[row.variant]), len(groups[row.variant])
        number = str(len(done)) + (f", {count - len(done)} diverged" if len(done) < count else "")
        if count:
            lines.append({"method": row.title, **(_columns(done) if done else {}), "n": number})
    titles = [title for title in TITLES if any(line.get(title) for line in lines)]
    return markdown([titles, *([line.get(title, "") for title in titles] for line in lines)])


def _columns(records: list[Record]) -> dict[str, str]:
    """Cells of a row by the titles of their columns, from records of runs that did not diverge."""
    first, online = records[0], records[0]["online_teacher"]
    columns = {
        "N": str(first["settings"]["num_students"]),
        "parameters": f"{first['params']:,}",
        "exported": _mean(exported, records),
    }
    if "test_top5" in first:
        columns["top-5"] = _mean(lambda record: record["test_top5"], records)
    if first["settings"]["num_students"] > 1:
        columns["mean"] = _mean(mean_student, records)
    if online:
        columns["online teacher"] = _mean(online_teacher, records)
    if online and "params" in online:
        columns["its parameters"] = f"{online['params']:,}"
    if first.get("disagreement"):
        columns["disagree"] = _mean(lambda record: record["disagreement"], records)
    return columns


def _mean(value: Callable[[Record], float], records: list[Record]) -> str:
    return f"{Mean.of(value, records):.2f}"


def _comparisons(table: Table, groups: Groups) -> str:
    """Differences between variants that have both been trained: of exported students, and of means of students."""
    titles = {row.variant: row.title for row in table.rows}
    lines = []
    for ours, theirs in ((ours, theirs) for ours, others in COMPARED.items() for theirs in others.split()):
        pair = [trained(groups.get(variant, [])) for variant in (ours, theirs)]
        if all(pair):
            gains = [Mean.of(value, pair[0]) - Mean.of(value, pair[1]) for value in (exported, mean_student)]
            lines.append([f"{titles[ours]}, minus {titles[theirs]}", *(f"{gain:+.2f}" for gain in gains)])
    return markdown([["difference, points", "exported", "mean"], *lines]) if lines else ""


def plot(figure: Any, title: str, table: Table, groups: Groups) -> None:
    """Accuracy of a table's networks against their parameters."""
    points = []  # (parameters, accuracy, marker, color, label)
    for i, row in enumerate(table.rows):
        if done := trained(groups[row.variant]):
            marker, online = "*" if done[0]["conv"] is None else "o", done[0]["online_teacher"] or {}
            points.append((done[0]["params"], Mean.of(exported, done), marker, f"C{i % 10}", row.title))
            if "params" in online:
                accuracy, label = Mean.of(online_teacher, done), f"{row.title}: online teacher"
                points.append((online["params"], accuracy, "D", f"C{i % 10}", label))
    axes = figure.subplots()
    for size, mean, marker, color, label in points:
        group = [point[-1] for point in points if point[0] == size]
        place = size * 1.05 ** (group.index(label) - (len(group) - 1) / 2)  # beside each other, around their tick
        error = 0 if math.isnan(mean.error) else mean.error
        axes.errorbar(place, mean.mean, error, fmt=marker, markersize=6, capsize=2, color=color, label=label)
    sizes = sorted({size for size, *_ in points})
    axes.set(title=title, xlabel="parameters", xscale="log")
    axes.set_ylabel("test accuracy, top-1 %: mean and standard error")
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.set_xticks(sizes, [f"{size / 1e3:.0f} k" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
