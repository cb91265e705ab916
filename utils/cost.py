"""Costs of a network (parameters, multiply-accumulates, latency), and the convolutions to make cheap for a budget."""

import copy
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.loader import Batches
from model.convert import inherit, replaced
from model.reconstruct import reconstruct
from model.weights import place
from utils.errors import UserError, first_line
from utils.metrics import accuracy


class Cost(NamedTuple):
    """params: number of parameters; macs: multiply-accumulates of convolutions and matrix products for one image."""

    params: int
    macs: int


class Latency(NamedTuple):
    """median: of repeated passes, in ms; spread: from the 10th to the 90th percentile, relative to the median."""

    median: float
    spread: float


def count(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Cost of `model` on one image of `input_size` (C, H, W), or (B, C, H, W) with any B."""
    with FlopCounterMode(display=False) as counter:
        _forward(model, input_size)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def check_fits(model: nn.Module, name: str, input_size: Sequence[int], num_classes: int) -> None:
    """Raise a UserError unless `model` maps an image of `input_size` (C, H, W) to num_classes logits."""
    try:
        logits = _forward(model, input_size)
    except OSError:
        raise
    except Exception as error:  # the network may be the user's own and fail in any way
        size = " x ".join(map(str, input_size[1:]))
        raise UserError(f"{name} does not take images of {size}: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        given = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name} gives {given} for an image, not the logits of {num_classes} classes")


def _forward(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Output for one image, computed by a copy on the meta device, in channels_last as in training."""
    shadow = place(copy.deepcopy(model), "meta").eval()
    image = torch.empty(1, *input_size[-3:], device="meta").to(memory_format=torch.channels_last)
    with torch.no_grad():
        return shadow(image)


def forward_pass(network: nn.Module, images: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """A call of the network on images (B, C, H, W), for `latency`, both moved to the device; sets eval mode."""
    network = place(network, device).eval()
    return partial(network, images.to(device, memory_format=torch.channels_last))


def latency(calls: Sequence[Callable[[], object]], device: torch.device) -> list[Latency]:
    """Latency of each of `calls` in inference mode: 5 to 30 passes, as many as 2 s a call allow."""
    with torch.inference_mode():
        times = time_in_turn(calls, device, rounds=30, warm_up=3, limit=2.0 * len(calls))
    quantiles = [(1e3 * np.percentile(taken, (10, 50, 90))).tolist() for taken in times]
    return [Latency(median, (high - low) / median) for low, median, high in quantiles]


def time_in_turn(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int, warm_up: int = 2, limit: float = math.inf
) -> list[list[float]]:
    """Seconds of each pass of every call; the calls take turns, so that a change in load affects all of them alike.

    Args:
        rounds: timed passes of each call; when `limit` seconds are over, 5 are enough.
        warm_up: passes of each call before the timed ones.
    """

    def seconds(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - started

    for call in [*calls] * warm_up:
        seconds(call)
    passes, deadline = [], time.perf_counter() + limit
    while len(passes) < rounds and (len(passes) < 5 or time.perf_counter() < deadline):
        passes.append([seconds(call) for call in calls])
    return list(map(list, zip(*passes, strict=True)))


@dataclass
class Candidates:
    """The students with the first 0, 1, 2 … convolutions of `names` cheap, which start from the teacher's weights.

    The convolutions are ordered by the share of their energy that the closest cheap weights lose, per MAC saved. Those
    that save nothing alone come last, such as a second one of a ResNet's block, with which the stride moves.

    Attributes:
        build: returns a student; its argument `replaced` names the cheap convolutions, None for all.
    """

    build: Callable[..., nn.Module]
    teacher: nn.Module
    input_size: Sequence[int]
    images: Sequence[Tensor]
    val: Batches
    names: list[str] = field(init=False)

    def __post_init__(self):
        student = self.build(replaced=None)
        self.standard_macs = count(self.build(replaced=[]), self.input_size).macs
        costs = {}
        for name, (cheap, conv) in replaced(student, self.teacher).items():
            lost = cheap.approximate(conv.weight) / conv.weight.double().square().sum().item()
            saved = self.standard_macs - count(self.build(replaced=[name]), self.input_size).macs
            costs[name] = lost / saved if saved > 0 else math.inf
        self.names = sorted(costs, key=costs.get)
        self._known: dict[int, float] = {}

    def macs(self, number: int) -> float:
        """Share of the standard network's MACs that the student with `number` cheap convolutions has."""
        return count(self.build(replaced=self.names[:number]), self.input_size).macs / self.standard_macs

    def top1(self, number: int) -> float:
        """Validation accuracy of the student with `number` cheap convolutions before training, in %."""
        if number not in self._known:
            student = self.build(replaced=self.names[:number]).to(self.images[0].device)
            inherit(student, self.teacher)
            reconstruct(student, self.teacher, self.images)
            self._known[number] = accuracy(student, self.val).top1
        return self._known[number]

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
        allowed, descending = self.top1(0) - points, range(len(self.names), 0, -1)
        first = bisect_left(descending, True, key=lambda number: self.top1(number) >= allowed)
        if first == len(descending):
            least = self.top1(0) - self.top1(1)
            raise UserError(f"--max_drop {points:g} is too small: one cheap convolution costs {least:.2f} points")
        return descending[first]

    def curve(self, chosen: int) -> list[list[float]]:
        """Number of cheap convolutions, share of the MACs and top-1 of some students, by number.

        They are the chosen one, those that were evaluated, and those with 0 to 4 quarters of the convolutions.
        """
        numbers = {chosen, *self._known, *(round(quarter * len(self.names) / 4) for quarter in range(5))}
        return [[number, self.macs(number), self.top1(number)] for number in sorted(numbers)]
