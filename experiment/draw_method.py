"""Draws experiment/method.svg, the picture of the method in the README: `python experiment/draw_method.py`."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

GRAY, BLUE, RED, GREEN = "#495057", "#1c6dd0", "#c92a2a", "#2b8a3e"
FILL = {GRAY: "#f1f3f5", BLUE: "#e7f0fd", RED: "#fff0f0", GREEN: "#ebfbee"}


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    style = "round,pad=0,rounding_size=0.12"
    patch = FancyBboxPatch((x, y), width, height, boxstyle=style, edgecolor=color, facecolor=FILL[color], linewidth=1.4)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color="#212529")


def arrow(axes: Axes, start: tuple, end: tuple, color: str, style: str = "-|>", bend: float = 0.0, **line) -> None:
    patch = FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=12, color=color, connectionstyle=f"arc3,rad={bend}", **line
    )
    axes.add_patch(patch)


def main() -> None:
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "method"})
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 19.2), ylim=(0, 8.4))
    axes.axis("off")

    box(axes, 0.1, 3.3, 1.5, 1.2, "images\nand labels", GRAY)
    rows = (5.1, 3.55, 1.2)
    for y, name in zip(rows, ("1", "2", "N"), strict=True):
        box(axes, 2.8, y, 3.1, 0.95, f"student {name}\ncheap convolutions", BLUE)
        box(axes, 6.9, y, 1.9, 0.95, "feature map", BLUE)
        box(axes, 13.9, y, 2.1, 0.95, f"logits $z_{name}$", BLUE)
        arrow(axes, (1.6, 3.9), (2.8, y + 0.48), GRAY)
        arrow(axes, (5.9, y + 0.48), (6.9, y + 0.48), BLUE)
        arrow(axes, (8.8, y + 0.48), (13.9, y + 0.48), BLUE)
        arrow(axes, (8.8, y + 0.62), (9.75, 7.05), RED, bend=0.12)
    axes.text(4.35, 2.83, "...", ha="center", fontsize=16, color=BLUE)
    axes.text(11.6, 1.78, "own pool and classifier", ha="center", fontsize=8.5, color=BLUE)

    box(axes, 9.1, 7.05, 3.6, 1.15, "online teacher: concatenate,\nBN, ReLU, pool, classifier", RED)
    box(axes, 13.9, 7.15, 2.1, 0.95, "logits $z_t$", RED)
    arrow(axes, (12.7, 7.62), (13.9, 7.62), RED)

    box(axes, 2.8, 7.15, 3.1, 0.95, "pretrained teacher\nstandard convolutions", GREEN)
    box(axes, 6.9, 7.15, 1.5, 0.95, "logits $z_p$", GREEN)
    arrow(axes, (1.6, 4.2), (2.8, 7.5), GRAY)
    arrow(axes, (5.9, 7.62), (6.9, 7.62), GREEN)
    axes.text(4.35, 6.83, "frozen; optional", ha="center", fontsize=8.5, color=GREEN)

    for y in rows:
        arrow(axes, (16.0, 7.4), (16.0, y + 0.6), RED, style="<|-|>", bend=-0.35, linestyle="--")
    axes.text(17.15, 4.2, "$\\lambda$ KL, mutual:\nboth sides learn", fontsize=9, color=RED)
    arrow(axes, (8.0, 7.15), (13.9, rows[0] + 0.72), GREEN, bend=0.05, linestyle="--")
    axes.text(12.2, 6.45, r"$\mu$ KL, to every student", fontsize=9, color=GREEN, ha="center")

    axes.text(15.0, 0.55, "each also learns from the labels", ha="center", fontsize=8.5, color=GRAY)
    axes.text(4.35, 0.55, "the best student on the validation set is exported", ha="center", fontsize=8.5, color=BLUE)
    figure.savefig(Path(__file__).with_name("method.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
