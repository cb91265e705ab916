"""What changes in the course of a training: the learning rate, and the weight of the online term."""

import math

from utils.config import Config


class Schedule:
    """As the flags say. A moment is an epoch (from 1) and the share of its steps that are done with the present one."""

    def __init__(self, config: Config):
        self.lr, self.num_epochs = config.lr, config.num_epochs
        self.decay_epochs = config.lr_decay_step if config.scheduler == "step" else None
        self.warmup_epochs, self.rampup_epochs = config.warmup_epochs, config.rampup_epochs

    def rate(self, epoch: int, share: float = 1.0) -> float:
        """Learning rate; it rises linearly to warm up.

        ResNets this deep do not start to learn at their full rate (He et al., arXiv 1512.03385, section 4.2), and the
        distillation terms make the first steps steeper still: without a warm-up, ResNet-56 students diverge.
        """
        if self.decay_epochs is None:
            rate = cosine_rate(self.lr, self.num_epochs, epoch)
        else:
            rate = step_rate(self.lr, self.decay_epochs, epoch)
        return rate * (min(1.0, (epoch - 1 + share) / self.warmup_epochs) if self.warmup_epochs else 1.0)

    def rampup(self, epoch: int, share: float = 1.0) -> float:
        """Factor of the online term: exp(-5 (1 - t)^2), t from 0 to 1 over rampup_epochs (arXiv 1610.02242, 2)."""
        t = min(1.0, (epoch - 1 + share) / self.rampup_epochs) if self.rampup_epochs else 1.0
        return math.exp(-5 * (1 - t) ** 2)


def step_rate(base: float, decay_epochs: list[int], epoch: int) -> float:
    """Learning rate of `epoch` (from 1): a tenth of it after each of decay_epochs."""
    return base * 0.1 ** sum(epoch > decay for decay in decay_epochs)


def cosine_rate(base: float, num_epochs: int, epoch: int) -> float:
    """Learning rate of `epoch` (from 1): half a cosine from base down to 0 (arXiv 1608.03983, without restarts)."""
    return base / 2 * (1 + math.cos(math.pi * (epoch - 1) / num_epochs))
