"""curves.png: loss and accuracy over the epochs of a run."""

from typing import Any

from utils.errors import first_line
from utils.files import atomic_write
from utils.job import Job, read_metrics


def draw_curves(job: Job, best: dict[str, Any], teacher_accuracy: float | None) -> None:
    """Draw metrics.jsonl: the terms of the loss, and validation accuracies; nothing if matplotlib cannot be imported.

    Args:
        best: the epoch and student that were chosen.
        teacher_accuracy: of the pretrained teacher on the validation set, in %, if there is one.
    """
    try:  # matplotlib needs a folder for its cache, or for temporary files, that can be written
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, MaxNLocator
    except (ImportError, OSError) as error:
        job.logger.info(f"{job.curves.name} is not drawn: {first_line(error)}")
        return
    metrics = read_metrics(job.metrics)
    epochs = [line["epoch"] for line in metrics]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)

    for name in metrics[0]["train"]["loss"] if metrics else []:
        values = [line["train"]["loss"][name] for line in metrics]
        losses.plot(epochs, values, label=name, linewidth=2 if name == "total" else 1.2, marker=_marker(epochs))
    losses.set(title="Training loss and its weighted terms", xlabel="epoch", yscale="log")

    students = len(metrics[0]["val"]["accuracy"]["students"]) if metrics else 0
    for i in range(students):
        values = [line["val"]["accuracy"]["students"][i] for line in metrics]
        style = {"color": "tab:blue", "linewidth": 2} if i == best["student"] else {"color": "tab:blue", "alpha": 0.35}
        name = f"student {i + 1}" if students > 1 else "network"
        accuracies.plot(epochs, values, label=name, marker=_marker(epochs), **style)
    if metrics and "online_teacher" in metrics[0]["val"]["accuracy"]:
        values = [line["val"]["accuracy"]["online_teacher"] for line in metrics]
        accuracies.plot(epochs, values, label="online teacher", color="tab:red", marker=_marker(epochs))
    if teacher_accuracy is not None:
        accuracies.axhline(teacher_accuracy, label="pretrained teacher", color="black", linestyle="--", linewidth=1)
    accuracies.plot(best["epoch"], best["accuracy"], "*", color="tab:orange", markersize=13, label="exported", zorder=5)
    accuracies.set(title="Validation accuracy, top-1 %", xlabel="epoch")

    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(FixedLocator(epochs) if len(epochs) == 1 else MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    with atomic_write(job.curves) as file:
        figure.savefig(file, format="png", dpi=130)


def _marker(epochs: list[int]) -> str:
    return "." if len(epochs) <= 30 else ""
