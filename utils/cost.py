"""What a network costs: parameters, multiply-accumulates, measured latency."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """params: trainable numbers; macs: multiply-accumulates of convolutions and Linear layers for one image."""

    params: int
    macs: int


def count(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Cost of `model` on one image of `input_size` (C, H, W). Computes nothing and leaves the model as it is."""
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, *input_size[-3:], device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
