"""The networks of a run side by side, as tables, in a sentence and as JSON; and the pictures of a run.

Rows are compared with the first one, which is the standard network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from utils.cost import Cost, Latency
from utils.errors import first_line, log
from utils.files import atomic_write
from utils.metrics import Accuracy, Best

ONLINE_TEACHER = "online teacher"
SPLITS = {"val": "validation", "test": "test"}
BATCHES = (1, 256)  # batch sizes for latencies
PYTORCH, ONNX = "PyTorch", "ONNX Runtime"
PREFIXES = {PYTORCH: "", ONNX: "onnx_"}  # of latencies in report.json
UNSTEADY = 0.5  # spread above which a latency is marked as unsteady
MARK = "(unsteady)"

Cells = list[list[str]]
"""A table as text, the titles first."""


class ClassAccuracy(NamedTuple):
    """Number of test images of a class and the accuracy on them in %, None without images."""

    name: str
    images: int
    accuracy: float | None


@dataclass
class Row:
    """Accuracies and costs of a network of a run; None if unknown."""

    name: str  # title in tables; code uses the role
    role: str  # "standard", "student", "before" (the student that finetune.py refined) or "online_teacher"
    cost: Cost
    val: Accuracy | None = None
    test: Accuracy | None = None
    network: nn.Module | None = None  # its latency is measured if it is given
    exported: bool = False
    latencies: dict[tuple[str, int], Latency] = field(default_factory=dict)  # by runtime and batch size
    file_bytes: int | None = None
    onnx_bytes: int | None = None

    def __post_init__(self):
        self.not_finite = [split for split in SPLITS if (found := getattr(self, split)) and isnan(found.top1)]
        for split in self.not_finite:
            setattr(self, split, None)

    def summary(self) -> dict[str, Any]:
        """Name, role, cost and accuracies as plain values, for the metadata of files."""
        return {"name": self.name, "role": self.role, **self.cost._asdict(), **self.accuracies()}

    def accuracies(self) -> dict[str, float | None]:
        """ "val" and "test", top-1 in %, and "val_top5" and "test_top5" with more than ten classes."""
        values = {}
        for split in SPLITS:
            found = getattr(self, split)
            values[split] = found.top1 if found else None
            if found and found.top5 is not None:
                values[f"{split}_top5"] = found.top5
        return values


def read_row(summary: dict[str, Any]) -> Row:
    """A row from its `Row.summary`. Those of older files have no role; it follows from the name."""
    name = summary["name"]
    role = "online_teacher" if name == ONLINE_TEACHER else "standard" if name.endswith(", standard") else "student"
    found = [(summary.get(split), summary.get(f"{split}_top5")) for split in SPLITS]
    accuracies = [None if top1 is None else Accuracy(top1, top5) for top1, top5 in found]
    return Row(name, summary.get("role", role), Cost(summary["params"], summary["macs"]), *accuracies)


@dataclass(frozen=True)
class Quantity:
    """A cost, compared with the standard network's."""

    key: str  # in report.json
    title: str
    value: Callable[[Row], float | None]  # None if unknown
    text: Callable[[Row], str]  # of a known value
    words: tuple[str, str, str] = ("smaller", "larger", "as large")  # than the standard network's cost

    def ratio(self, standard: Row, row: Row) -> float | None:
        """The standard network's cost divided by this one's: above 1 is better. None if one of them is unknown."""
        before, after = self.value(standard), self.value(row)
        return None if before is None or after is None else before / after

    def change(self, standard: Row, row: Row) -> str:
        """ "1.25x smaller" for a ratio of 1.25, "1.25x larger" for 0.8; "" if unknown or for the standard network."""
        ratio = None if row is standard else self.ratio(standard, row)
        if ratio is None:
            return ""
        smaller, larger, equal = self.words
        times = f"{max(ratio, 1 / ratio):.2f}x"
        return equal if times == "1.00x" else f"{times} {smaller if ratio > 1 else larger}"


def _latency(runtime: str, batch: int) -> Quantity:
    def value(row: Row) -> float | None:
        return row.latencies[runtime, batch].median if (runtime, batch) in row.latencies else None

    def text(row: Row) -> str:
        return f"{value(row):.2f} ms" + (f" {MARK}" if row.latencies[runtime, batch].spread > UNSTEADY else "")

    key = f"{PREFIXES[runtime]}latency_{batch}"
    return Quantity(key, f"{runtime}, batch {batch}", value, text, ("faster", "slower", "as fast"))


PARAMS = Quantity("params", "parameters", lambda row: row.cost.params, lambda row: f"{row.cost.params:,}")
MACS = Quantity(
    "macs", "MACs", lambda row: row.cost.macs, lambda row: f"{row.cost.macs / 1e6:.2f} M", ("fewer", "more", "as many")
)
LATENCIES = {runtime: [_latency(runtime, batch) for batch in BATCHES] for runtime in PREFIXES}
MEASURED = [
    *LATENCIES[PYTORCH],
    *LATENCIES[ONNX],
    Quantity("file_bytes", ".pt file", lambda row: row.file_bytes, lambda row: f"{row.file_bytes:,} bytes"),
    Quantity("onnx_bytes", ".onnx file", lambda row: row.onnx_bytes, lambda row: f"{row.onnx_bytes:,} bytes"),
]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values, with the spread of latencies and each cost's ratio to the standard network's."""
    entries = []
    for row in rows:
        quantities = [quantity for quantity in (PARAMS, MACS, *MEASURED) if quantity.value(row) is not None]
        ratios = {quantity.key: quantity.ratio(rows[0], row) for quantity in quantities}
        entry = row.summary() | {quantity.key: quantity.value(row) for quantity in quantities}
        for (runtime, batch), latency in row.latencies.items():
            entry[f"{PREFIXES[runtime]}spread_{batch}"] = latency.spread
        entry["ratios"] = {key: ratio for key, ratio in ratios.items() if ratio is not None}
        entries.append(entry | {"exported": row.exported})
    return entries


def overview(rows: Sequence[Row], *splits: str) -> Cells:
    """Accuracy on the splits ("val", "test") and costs of each network."""
    columns = [["network", *(row.name for row in rows)]]
    for split in splits:
        found = [getattr(row, split) for row in rows]
        columns.append([f"{SPLITS[split]} top-1, %", *(_percent(accuracy and accuracy.top1) for accuracy in found)])
        if any(row.test and row.test.top5 is not None for row in rows):
            columns.append(["top-5, %", *(_percent(accuracy and accuracy.top5) for accuracy in found)])
    for quantity in (PARAMS, MACS):
        columns.append([quantity.title, *map(quantity.text, rows)])
        columns.append(["", *(quantity.change(rows[0], row) for row in rows)])
    return list(map(list, zip(*columns, strict=True)))


def measurements(rows: Sequence[Row]) -> Cells:
    """Latencies and sizes of files of the networks that were measured, side by side."""
    known = [quantity for quantity in MEASURED if any(quantity.value(row) is not None for row in rows)]
    columns = [["measured", *(quantity.title for quantity in known)]]
    for row in rows:
        if row.latencies:  # the other students have the costs of the best one
            texts = ["-" if quantity.value(row) is None else quantity.text(row) for quantity in known]
            columns.append([row.name, *texts])
            if row is not rows[0]:
                columns.append(["", *(quantity.change(rows[0], row) for quantity in known)])
    return list(map(list, zip(*columns, strict=True)))


def classes(accuracies: Sequence[ClassAccuracy], most: int = 20, worst: int = 10) -> Cells:
    """Test accuracy of the exported network by class: all classes up to `most` of them, else the `worst` ones."""
    known, title = [entry for entry in accuracies if entry.accuracy is not None], "class"
    if len(accuracies) > most:
        known = sorted(known, key=lambda entry: entry.accuracy)[:worst]
        title = f"the {len(known)} worst of {len(accuracies):,} classes"
    lines = [[entry.name, f"{entry.images:,}", _percent(entry.accuracy)] for entry in known]
    return [[title, "test images", "top-1 accuracy, %"], *lines]


def markdown(cells: Cells) -> str:
    titles, *lines = cells
    rule = ["---", *["--:"] * (len(titles) - 1)]
    escaped = [[cell.replace("|", "&#124;") for cell in line] for line in (titles, rule, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def plain(cells: Cells) -> str:
    """The table as text for the terminal."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def verdict(rows: Sequence[Row], title: str) -> str:
    """Summarize cost and accuracy of the exported network, compared with the standard one, in one sentence."""
    standard, (row,) = rows[0], [row for row in rows if row.exported]
    costs = [PARAMS.change(standard, row), f"{MACS.change(standard, row)} MACs"]
    for runtime, quantities in LATENCIES.items():
        changes = [(quantity.change(standard, row), batch) for quantity, batch in zip(quantities, BATCHES, strict=True)]
        if all(change for change, _ in changes):
            spread = max(network.latencies[runtime, batch].spread for network in (standard, row) for batch in BATCHES)
            speeds = " and ".join(f"{change} at batch {batch}" for change, batch in changes)
            costs.append(f"{speeds} ({runtime}{', unsteady' if spread > UNSTEADY else ''})")
    achieved = ["no accuracy, because its logits are not finite"]
    if row.test:
        others = [(standard, "the standard network")]
        others += [(before, "before it was refined") for before in rows if before.role == "before"]
        compared = [_points(row.test.top1 - other.test.top1, name) for other, name in others if other.test]
        achieved = [f"{row.test.top1:.2f} % test accuracy", *compared]
    return f"{title}: {', '.join(costs)}; {', '.join(achieved)}"


def _points(gained: float, name: str) -> str:
    points = f"{abs(gained):.2f}"
    if points == "0.00":
        return f"as much as {name}"
    return f"{points} points {'more' if gained > 0 else 'less'} than {name}"


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f}"


def budget(points: Sequence[Sequence[float]]) -> Cells:
    """The students that --pruned_num auto compared, as in `Meta.budget`."""
    titles = ["cheap convolutions", "MACs, % of the standard network's", "validation top-1 before training, %"]
    return [titles, *([str(number), f"{100 * macs:.1f}", f"{top1:.2f}"] for number, macs, top1 in points)]


def draw(path: Path, size: tuple[float, float], plot: Callable[..., None], *values: Any, dpi: int = 130) -> None:
    """Write a figure of this size in inches, filled by `plot(figure, *values)`, if matplotlib can be imported."""
    try:  # matplotlib needs a folder for its cache, or for temporary files, that can be written
        from matplotlib.figure import Figure
    except (ImportError, OSError) as error:
        log.info(f"{path.name} is not drawn: {first_line(error)}")
        return
    figure = Figure(figsize=size, layout="constrained")
    plot(figure, *values)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def plot_budget(figure: Any, points: Sequence[Sequence[float]], chosen: int) -> None:
    """Accuracies before training over MACs of the students in `points`, one of which was chosen."""
    axes, (_, shares, accuracies) = figure.subplots(), zip(*points, strict=True)
    percent = [100 * share for share in shares]
    axes.plot(percent, accuracies, marker="o")
    for (number, *_), x, y in zip(points, percent, accuracies, strict=True):
        style = {"color": "tab:orange", "weight": "bold"} if number == chosen else {}
        axes.annotate(f" {number}", (x, y), va="top", **style)
    axes.set(
        title="Before training, by number of cheap convolutions",
        xlabel="MACs, % of the standard network's",
        ylabel="validation top-1, %",
    )
    axes.grid(alpha=0.3)


def plot_curves(figure: Any, metrics: Sequence[dict[str, Any]], best: Best, teacher_accuracy: float | None) -> None:
    """Losses and validation accuracies over the epochs.

    Args:
        metrics: as `read_metrics` returns them.
        best: the chosen student.
        teacher_accuracy: of the pretrained teacher on the validation set, in %, if there is one.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    epochs = [line["epoch"] for line in metrics]
    losses, accuracies = [line["train"]["loss"] for line in metrics], [line["val"]["accuracy"] for line in metrics]
    left, right = figure.subplots(1, 2)
    marker = "." if len(epochs) <= 30 else ""

    for name in losses[0] if losses else []:
        width = 2 if name == "total" else 1.2
        left.plot(epochs, [terms[name] for terms in losses], label=name, linewidth=width, marker=marker)
    left.set(title="Training loss and its weighted terms", xlabel="epoch", yscale="log")

    students = list(zip(*(found["students"] for found in accuracies), strict=True))
    for i, values in enumerate(students):
        style = {"linewidth": 2} if i == best.student else {"alpha": 0.35}
        label = f"student {i + 1}" if len(students) > 1 else "network"
        right.plot(epochs, values, label=label, color="tab:blue", marker=marker, **style)
    if accuracies and "online_teacher" in accuracies[0]:
        values = [found["online_teacher"] for found in accuracies]
        right.plot(epochs, values, label=ONLINE_TEACHER, color="tab:red", marker=marker)
    if teacher_accuracy is not None:
        right.axhline(teacher_accuracy, label="pretrained teacher", color="black", linestyle="--", linewidth=1)
    right.plot(best.epoch, best.accuracy, "*", color="tab:orange", markersize=13, label="exported", zorder=5)
    right.set(title="Validation accuracy, top-1 %", xlabel="epoch")

    for axes in (left, right):
        axes.xaxis.set_major_locator(FixedLocator(epochs) if len(epochs) == 1 else MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
