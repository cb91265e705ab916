"""Costs of a network: parameters, multiply-accumulates, measured latency."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.weights import place
from utils.errors import UserError, first_line


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
    synchronize = partial(torch.accelerator.synchronize, device) if device.type != "cpu" else lambda: None
    times = [[] for _ in calls]
    deadline = math.inf
    for i in range(warm_up + rounds if calls else 0):
        if i == warm_up:
            deadline = time.perf_counter() + limit
        if i >= warm_up + 5 and time.perf_counter() >= deadline:
            break
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            synchronize()
            taken.append(time.perf_counter() - started)
    return [taken[warm_up:] for taken in times]
