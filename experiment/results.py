"""RESULTS.md: tables and plots of what experiment/study.py has recorded."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.files import atomic_write

Record = dict[str, Any]

METHODS = {
    "scratch": "scratch",
    "kd": "KD",
    "dml": "DML",
    "one": "ONE",
    "od_teacher_free": "OD, no pretrained teacher (μ = 0)",
    "od_teacher_free_lambda_0.8": "OD, λ = 0.8, μ = 0",
    "od": "OD",
    "od_lambda_0": "OD, λ = 0",
    "od_lambda_0.8": "OD, λ = 0.8",
}
# What OD is compared with; without the pretrained teacher, only with what has none either.
COMPARISONS = {
    "od": tuple(variant for variant in METHODS if variant != "od"),
    "od_teacher_free": ("scratch", "dml", "one", "od_teacher_free_lambda_0.8"),
}
DETAILS = {
    "od": "OD as it is by default (λ = 0.1)",
    "od_temperature_1": "T = 1",
    "od_temperature_2": "T = 2",
    "od_lambda_0.8": "λ = 0.8",
    "od_detached": "λ = 0.8, online teacher detached (--detach_teacher)",
    "od_rampup": "λ = 0.8, ramped up over 10 epochs (--rampup_epochs)",
    "od_released": "λ = 0.8, KL averaged over classes (--kl_reduction element), as released",
    "od_teacher_free": "no pretrained teacher (μ = 0)",
    "od_teacher_free_lambda_0.8": "μ = 0, λ = 0.8",
    "od_teacher_free_detached": "μ = 0, λ = 0.8, online teacher detached",
}
INTRODUCTION = """# Results

Written by `python experiment/study.py STUDY`, which trains what its tables show; `python experiment/study.py` writes
them anew from the records of the runs, results/STUDY.jsonl. Top-1 accuracy in %, mean ± standard deviation over the n
seeds. "Best" is the student that is exported, chosen with its epoch on the validation set; "mean" is that of all
students of a run, which choosing does not favor. Accuracies are of the test set, looked at once, but those under
"validation". In the tables that change OD's settings every row is of the same seeds; a run whose loss was not finite in
the end ("diverged") has no accuracy.
"""


class Sweep(NamedTuple):
    """Runs of `method` that differ in one setting alone; `changes` is how the names of their variants begin."""

    title: str
    setting: str
    method: str
    changes: str


SWEEPS = (
    Sweep("students N", "num_students", "od", "students_"),
    Sweep("λ", "lambda", "od", "lambda_"),
    Sweep("μ", "miu", "od", "miu_"),
    Sweep("λ (μ = 0)", "lambda", "od_teacher_free", "lambda_"),
)


class Mean(NamedTuple):
    """Of n values: their mean, standard deviation and standard error (NaN for n = 1)."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))

    @property
    def error(self) -> float:
        return self.std / math.sqrt(self.n)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.std) else f" ± {self.std:.2f}")


def trained(records: Iterable[Record]) -> list[Record]:
    """Those that did not diverge."""
    return [record for record in records if "diverged" not in record]


def best(record: Record) -> float:
    return record["test"]


def validation(record: Record) -> float:
    return record["val"]


def mean_student(record: Record) -> float:
    return statistics.fmean(student["test"] for student in record["students"])


def online_teacher(record: Record) -> float:
    return record["online_teacher"]["test"]


def records_file(out: Path, study: str) -> Path:
    return out / "results" / f"{study}.jsonl"


def read_records(out: Path, study: str) -> list[Record]:
    path = records_file(out, study)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_results(out: Path) -> None:
    """Write RESULTS.md and its plots from all the records in `out`."""
    text = [INTRODUCTION]
    for path in sorted((out / "results").glob("*.jsonl")):
        text += _section(path.stem, read_records(out, path.stem), out / "results")
    with atomic_write(out / "RESULTS.md", "w") as file:
        file.write("\n".join(text))


def _section(study: str, records: list[Record], folder: Path) -> list[str]:
    every_run = [record for record in records if record["variant"] != "teacher"]
    records, runs = trained(records), trained(every_run)
    if not runs:
        return []
    hardware = sorted({", ".join(record["environment"].values()) for record in records})
    examples = {record["variant"]: record["flags"] for record in runs}
    text = [f"## {study}", ""]
    text += [f"- {runs[0]['data']}."]
    if "of jpg files" in runs[0]["data"]:
        text += ["- JPEG compression costs every network accuracy: only differences between rows count."]
    text += [
        f"- `python experiment/study.py {study}`, with the flags",
        *(f"  - {title}: `{examples[variant]}`" for variant, title in METHODS.items() if variant in examples),
        *(f"- Each run on {line} (device, execution, torch)." for line in hardware),
        "",
        *_methods_table(records, runs),
        "",
        *(line for variant in COMPARISONS for line in _comparison(runs, variant)),
        "Differences in points, ± the sum of the standard errors of the two means.",
        "",
    ]
    _draw_costs(records, folder / f"{study}_costs.png", study)
    text += [f"![accuracy against costs](results/{study}_costs.png)", ""]
    base = [record for record in runs if record["variant"] == "od"][:1]
    swept = [record for record in every_run if base and _same_network(record, base[0])]
    tables = [_sweep_table(swept, sweep) for sweep in SWEEPS]
    if any(tables):
        _draw_sweeps(swept, folder / f"{study}_sweeps.png", study)
        text += [line for table in tables for line in table]
        text += [f"![accuracy against N, λ and μ](results/{study}_sweeps.png)", ""]
    return text + _details_table(swept)


def _methods_table(records: list[Record], runs: list[Record]) -> list[str]:
    lines = [
        "| network | method | N | best | mean | online teacher | validation | n |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model in dict.fromkeys(record["model"] for record in records):
        for record in records:
            if record["variant"] == "teacher" and record["model"] == model:
                name = f"{model}, standard: the pretrained teacher"
                lines.append(f"| {name} | | | {record['test']:.2f} | | | {record['val']:.2f} | 1 |")
    for (model, conv), group in _grouped(runs, lambda record: (record["model"], record["conv"])).items():
        for variant, title in METHODS.items():
            of_method = [record for record in group if record["variant"] == variant]
            if of_method:
                online = Mean.of(map(online_teacher, of_method)) if of_method[0]["online_teacher"] else ""
                cells = [f"{model}, {conv}", title, of_method[0]["settings"]["num_students"]]
                cells += [Mean.of(map(best, of_method)), Mean.of(map(mean_student, of_method)), online]
                cells += [Mean.of(map(validation, of_method)), len(of_method)]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _comparison(runs: list[Record], variant: str) -> list[str]:
    """What a variant gains over others, the best student of each run, with the sum of the two standard errors."""
    others = COMPARISONS[variant]
    lines = [f"| {METHODS[variant]}, minus | {' | '.join(METHODS[other] for other in others)} |"]
    lines.append(f"|---|{'--:|' * len(others)}")
    for (model, conv), group in _grouped(runs, lambda record: (record["model"], record["conv"])).items():
        means = {name: Mean.of(map(best, of)) for name, of in _grouped(group, lambda record: record["variant"]).items()}
        cells = [
            _difference(means[variant], means[other]) if {variant, other} <= means.keys() else "" for other in others
        ]
        lines.append(f"| {model}, {conv} | {' | '.join(cells)} |")
    return [*lines, ""]


def _difference(ours: Mean, theirs: Mean) -> str:
    errors = ours.error + theirs.error
    return f"{ours.mean - theirs.mean:+.2f}" + ("" if math.isnan(errors) else f" ± {errors:.2f}")


def _sweep(runs: list[Record], sweep: Sweep) -> dict[float, list[Record]]:
    """The runs of a sweep, by the value of its setting."""
    wanted = {sweep.method} | ({"od_teacher_free"} if sweep.setting == "miu" else set())
    beginning = f"{sweep.method}_{sweep.changes}"
    chosen = [run for run in runs if run["variant"] in wanted or run["variant"].startswith(beginning)]
    groups = _grouped(chosen, lambda record: record["settings"][sweep.setting])
    return dict(sorted(_of_common_seeds(groups).items()))


def _sweep_table(runs: list[Record], sweep: Sweep) -> list[str]:
    groups = _sweep(runs, sweep)
    if len(groups) < 2:
        return []
    lines = [f"| {sweep.title} | best | mean | online teacher | validation | n |", "|--:|--:|--:|--:|--:|--:|"]
    for value, group in groups.items():
        lines.append(f"| {value:g} | {_cells(group)} |")
    return [*lines, ""]


def _details_table(runs: list[Record]) -> list[str]:
    groups = _grouped((run for run in runs if run["variant"] in DETAILS), lambda record: record["variant"])
    groups = _of_common_seeds(groups)
    if not set(groups) - {"od", "od_teacher_free"}:
        return []
    lines = ["| variant | best | mean | online teacher | validation | n |", "|---|--:|--:|--:|--:|--:|"]
    lines += [f"| {title} | {_cells(groups[variant])} |" for variant, title in DETAILS.items() if variant in groups]
    return [*lines, ""]


def _of_common_seeds(groups: dict[Any, list[Record]]) -> dict[Any, list[Record]]:
    """The groups, each with the seeds alone that all of them have: only then are differences those of the settings."""
    common = set.intersection(*({record["seed"] for record in group} for group in groups.values())) if groups else set()
    return {key: [record for record in group if record["seed"] in common] for key, group in groups.items() if common}


def _cells(group: list[Record]) -> str:
    ended = trained(group)
    if not ended:
        return f"diverged | | | | {len(group)}"
    online = [online_teacher(record) for record in ended if record["online_teacher"]]
    cells = [Mean.of(map(best, ended)), Mean.of(map(mean_student, ended)), Mean.of(online) if online else ""]
    count = f"{len(ended)}" + (f", {len(group) - len(ended)} diverged" if len(ended) < len(group) else "")
    return " | ".join(map(str, [*cells, Mean.of(map(validation, ended)), count]))


def _draw_costs(records: list[Record], path: Path, title: str) -> None:
    figure = Figure(figsize=(13, 5), layout="constrained")
    macs, params = figure.subplots(1, 2, sharey=True)
    _draw_over_cost(macs, records, "macs")
    _draw_over_cost(params, records, "params")
    macs.set(xlabel="multiply-accumulates of an image", ylabel="test accuracy, top-1 %")
    params.set(xlabel="parameters")
    figure.legend(*params.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(f"{title}: best student of each run, mean and standard deviation over seeds", fontsize=11)
    _save(figure, path)


def _draw_over_cost(axes: Axes, records: list[Record], cost: str) -> None:
    teachers = [record for record in records if record["variant"] == "teacher"]
    axes.plot(
        [r[cost] for r in teachers], list(map(best, teachers)), "k*", markersize=12, label="standard, the teacher"
    )
    for i, (variant, name) in enumerate(METHODS.items()):
        of_method = [record for record in records if record["variant"] == variant]
        if not of_method:
            continue
        groups = _grouped(of_method, lambda record: (record["model"], record["conv"])).values()
        means = [Mean.of(map(best, group)) for group in groups]
        dodge = 1.02 ** (i - len(METHODS) / 2)  # methods of one network cost the same
        places = [group[0][cost] * dodge for group in groups]
        axes.errorbar(
            places, [m.mean for m in means], _bars(means), fmt="o", markersize=5, capsize=2, color=f"C{i}", label=name
        )
    several = len({record["model"] for record in records}) > 1
    networks = {r[cost]: f"{r['model']} " * several + (r["conv"] or "standard") for r in records}
    unit, name = (1e6, "M") if cost == "macs" else (1e3, "k")
    labels = [f"{network}: {value / unit:,.1f} {name}" for value, network in networks.items()]
    axes.set_xscale("log")
    axes.set_xticks(list(networks), labels, rotation=35, ha="right", fontsize=8)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def _draw_sweeps(runs: list[Record], path: Path, title: str) -> None:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = {sweep: groups for sweep in SWEEPS if len(groups := _sweep(runs, sweep)) > 1}
    panels = {
        sweep: {value: ended for value, group in groups.items() if (ended := trained(group))}
        for sweep, groups in panels.items()
    }
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (sweep, groups) in zip(all_axes, panels.items(), strict=True):
        _draw_line(axes, groups, best, "best student", "tab:blue")
        _draw_line(axes, groups, mean_student, "mean of the students", "tab:cyan")
        with_teacher = {value: [r for r in group if r["online_teacher"]] for value, group in groups.items()}
        _draw_line(axes, {v: g for v, g in with_teacher.items() if g}, online_teacher, "online teacher", "tab:red")
        axes.set(xlabel=sweep.title)
        axes.set_xticks(list(groups), [f"{value:g}" for value in groups])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, top-1 %")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}: OD, {runs[0]['model']}, {runs[0]['conv']}, one setting changed", fontsize=11)
    _save(figure, path)


def _draw_line(
    axes: Axes, groups: dict[float, list[Record]], value: Callable[[Record], float], label: str, color: str
) -> None:
    means = [Mean.of(map(value, group)) for group in groups.values()]
    axes.errorbar(list(groups), [m.mean for m in means], _bars(means), marker="o", capsize=2, label=label, color=color)


def _bars(means: list[Mean]) -> list[float]:
    """Standard deviations to draw; none where there is only one value."""
    return [0 if math.isnan(mean.std) else mean.std for mean in means]


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _same_network(a: Record, b: Record) -> bool:
    return (a["model"], a["conv"]) == (b["model"], b["conv"])
