"""Checkpoints of other projects: what their architectures' files share to read them."""

import re

from torch import Tensor


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """A state dict under other keys: each pattern of `names` that a key matches somewhere is replaced, in order."""
    return {_renamed(key, names): value for key, value in weights.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    for pattern, name in names.items():
        key = re.sub(pattern, name, key)
    return key


def fold_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function in eval mode, without the bias of a convolution right before a BatchNorm in a Sequential.

    BatchNorm subtracts its running mean from what the convolution adds the bias to: a mean less the bias does both.
    """
    folded = dict(weights)
    for key, bias in weights.items():
        if match := re.fullmatch(r"(.+)\.(\d+)\.bias", key):
            mean = f"{match[1]}.{int(match[2]) + 1}.running_mean"
            if mean in weights and weights[mean].shape == bias.shape:
                folded[mean] = weights[mean].float() - folded.pop(key).float()
    return folded
