"""--pruned_num auto: which convolutions are made cheap for a budget of accuracy or of multiply-accumulates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from data.loader import Batches
from model.convert import inherit, replaced
from model.reconstruct import reconstruct
from utils.checkpoint import load_checkpoint
from utils.config import AUTO
from utils.cost import count
from utils.errors import UserError
from utils.files import atomic_write
from utils.job import Job
from utils.metrics import accuracy
from utils.setup import Run
from utils.tables import Cells, new_figure

Builder = Callable[[Sequence[str] | None], nn.Module]  # names of the cheap convolutions (None: all) -> student


class Point(NamedTuple):
    """A student before training: its cheap convolutions, share of the standard MACs, validation top-1 in %."""

    replaced: int
    macs: float
    top1: float


@dataclass
class Candidates:
    """The students with the first 0, 1, 2 … convolutions of `names` cheap, which start from the teacher's weights.

    The convolutions are ordered by the share of their energy that the closest cheap weights lose, per MAC saved. Those
    that save nothing alone come last, such as a second one of a ResNet's block, with which the stride moves.

    Attributes:
        points: the students that were evaluated, by their number of cheap convolutions.
    """

    build: Builder
    teacher: nn.Module
    input_size: Sequence[int]
    images: Sequence[Tensor]
    val: Batches
    names: list[str] = field(init=False)
    points: dict[int, Point] = field(default_factory=dict)

    def __post_init__(self):
        student = self.build(None)
        paths = {module: name for name, module in student.named_modules()}
        self.standard_macs = count(self.build([]), self.input_size).macs
        costs = {}
        for cheap, conv in replaced(student, self.teacher):
            lost = cheap.approximate(conv.weight) / conv.weight.double().square().sum().item()
            saved = self.standard_macs - count(self.build([paths[cheap]]), self.input_size).macs
            costs[paths[cheap]] = lost / saved if saved > 0 else math.inf
        self.names = sorted(costs, key=costs.get)

    def macs(self, number: int) -> float:
        """Share of the standard network's MACs."""
        return count(self.build(self.names[:number]), self.input_size).macs / self.standard_macs

    def point(self, number: int) -> Point:
        if number not in self.points:
            student = self.build(self.names[:number]).to(self.images[0].device)
            inherit(student, self.teacher)
            reconstruct(student, self.teacher, self.images)
            self.points[number] = Point(number, self.macs(number), accuracy(student, self.val).top1)
        return self.points[number]

    def within_macs(self, share: float) -> int:
        """The least number of cheap convolutions with at most this share of the MACs.

        Raises:
            UserError: all of them leave more.
        """
        for number in range(len(self.names) + 1):
            least = self.macs(number)
            if least <= share:
                return number
        raise UserError(f"--macs {share:g} is too small: with all convolutions cheap, {least:.3f} of the MACs remain")

    def within_drop(self, points: float) -> int:
        """The largest number of cheap convolutions that costs at most so many points, found by bisection.

        Raises:
            UserError: one is too many.
        """
        low, high = 0, len(self.names)
        allowed = self.point(0).top1 - points
        while low < high:
            middle = (low + high + 1) // 2
            if self.point(middle).top1 >= allowed:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            least = self.point(0).top1 - self.point(1).top1
            raise UserError(f"--max_drop {points:g} is too small: one cheap convolution costs {least:.2f} points")
        return low

    def curve(self) -> list[Point]:
        """The evaluated students and those with a quarter, a half, three quarters and all of the convolutions."""
        for quarter in range(5):
            self.point(round(quarter * len(self.names) / 4))
        return [self.points[number] for number in sorted(self.points)]


def choose(run: Run, build: Builder) -> tuple[list[str], list[Point]]:
    """The cheap convolutions of --pruned_num auto, and the students that were compared; those of a resumed checkpoint.

    Raises:
        UserError: no student keeps within the budget.
    """
    if run.resumed:
        meta = load_checkpoint(run.resumed).meta
        return meta.build["replaced"], [Point(*point) for point in meta.budget]
    candidates = Candidates(build, run.teacher, run.dataset.input_size, run.sample(), run.loaders.val)
    macs, max_drop = run.config.macs, run.config.max_drop
    number = candidates.within_macs(macs) if max_drop is None else candidates.within_drop(max_drop)
    candidates.point(number)
    return candidates.names[:number], candidates.curve()


def students(run: Run, build: Callable[..., nn.Module]) -> tuple[list[nn.Module], list[Point] | None]:
    """The students of a run and, with --pruned_num auto, those that were compared."""
    chosen, points = {}, None
    if run.config.pruned_num == AUTO:
        names, points = choose(run, lambda names: build(replaced=names))
        chosen = {"replaced": names}
    return [build(**chosen) for _ in range(run.config.num_students)], points


def table(points: Sequence[Point]) -> Cells:
    titles = ["cheap convolutions", "MACs, % of the standard network's", "validation top-1 before training, %"]
    return [titles, *([str(p.replaced), f"{100 * p.macs:.1f}", f"{p.top1:.2f}"] for p in points)]


def draw(job: Job, points: Sequence[Point], chosen: int) -> None:
    """Draw the accuracies over the MACs, if matplotlib can be imported."""
    if (figure := new_figure(job, job.budget, (6, 4.2))) is None:
        return
    axes = figure.subplots()
    axes.plot([100 * p.macs for p in points], [p.top1 for p in points], marker="o")
    for point in points:
        style = {"color": "tab:orange", "weight": "bold"} if point.replaced == chosen else {}
        place = (100 * point.macs, point.top1)
        axes.annotate(f" {point.replaced}", place, va="top", **style)
    axes.set(
        title="Before training, by number of cheap convolutions",
        xlabel="MACs, % of the standard network's",
        ylabel="validation top-1, %",
    )
    axes.grid(alpha=0.3)
    with atomic_write(job.budget) as file:
        figure.savefig(file, format="png", dpi=130)
