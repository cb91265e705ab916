"""What a network costs: parameters, multiply-accumulates, measured latency."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from utils.errors import UserError, first_line


class Cost(NamedTuple):
    """params: numbers in the parameters; macs: multiply-accumulates of convolutions and Linear layers for one image."""

    params: int
    macs: int


class Latency(NamedTuple):
    """median: of repeated passes, in ms; spread: from the 10th to the 90th percentile, as a share of the median."""

    median: float
    spread: float


def count(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Cost of `model` on one image of `input_size` (C, H, W), or (B, C, H, W) with any B.

    Computes nothing and leaves the model as it is.
    """
    with FlopCounterMode(display=False) as counter:
        _forward(model, input_size)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def check_fits(model: nn.Module, name: str, input_size: Sequence[int], num_classes: int) -> None:
    """Raise a UserError unless `model` takes images of `input_size` (C, H, W) and gives num_classes logits of each."""
    try:
        logits = _forward(model, input_size)
    except OSError:
        raise
    except Exception as error:  # the network may be anybody's
        size = " x ".join(map(str, input_size[1:]))
        raise UserError(f"{name} does not take images of {size}: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        given = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name} gives {given} for an image, not the logits of {num_classes} classes")


def _forward(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """What `model` returns for one image, in shape alone; in channels_last, as in training."""
    shadow = copy.deepcopy(model).to("meta", memory_format=torch.channels_last).eval()
    image = torch.empty(1, *input_size[-3:], device="meta").to(memory_format=torch.channels_last)
    with torch.no_grad():
        return shadow(image)


def forward_pass(network: nn.Module, images: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """The pass of a network over images (B, C, H, W), for `latency`; moves both to the device, in channels_last.

    The network goes into eval mode.
    """
    network = network.to(device, memory_format=torch.channels_last).eval()
    return partial(network, images.to(device, memory_format=torch.channels_last))


def latency(passes: Sequence[Callable[[], object]], device: torch.device) -> list[Latency]:
    """What each of `passes`, functions that compute on the device, takes, by 5 to 30 calls after a warm-up.

    They take turns, so that a change in the machine's load meets all of them.
    """
    wait = partial(torch.accelerator.synchronize, device) if device.type != "cpu" else lambda: None
    times = [[] for _ in passes]
    with torch.inference_mode():
        for _ in range(3):
            for run in passes:
                run()
        wait()
        deadline = time.perf_counter() + 2.0 * len(passes)
        while len(times[0]) < 5 or (len(times[0]) < 30 and time.perf_counter() < deadline):
            for run, taken in zip(passes, times, strict=True):
                started = time.perf_counter()
                run()
                wait()
                taken.append(1e3 * (time.perf_counter() - started))
    quantiles = [np.percentile(taken, (10, 50, 90)).tolist() for taken in times]
    return [Latency(median, (high - low) / median) for low, median, high in quantiles]
