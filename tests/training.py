"""What the tests of training and of its resumption need: a job, batches, and a network of one layer."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from data.loader import AugmentedBatches, Batches
from data.sources import Split
from model.online import Students
from tests.helpers import meta
from utils import options
from utils.checkpoint import Meta
from utils.device import Execution
from utils.engine import Trainer
from utils.files import from_plain

CPU = torch.device("cpu")
META = from_plain(Meta, meta(num_students=2, num_classes=4, classes=list("abcd")))


def arguments(*flags):
    return options.parse("main", ["--dataset", "digits", *map(str, flags)])


def loaders(count=22, batch_size=4):
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count) % 4)
    statistics = (0.5,) * 3, (0.25,) * 3, CPU
    return AugmentedBatches(split, batch_size, *statistics, padding=1, flip=False, seed=0), Batches(
        split, 10, *statistics
    )


class Forgetful(torch.nn.Module):
    """A network whose training draws random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(192, 4)

    def forward(self, x):
        return self.fc(F.dropout(x.flatten(1), training=self.training))


def of_forgetful(*flags):
    """A trainer of one student, and the metadata of its run; it has no online teacher."""
    args = arguments("--teacher_model", "resnet_20", "--num_students", 1, "--lambda", 0, "--lr_decay_step", 9, *flags)
    torch.manual_seed(0)
    return Trainer(Students([Forgetful()]), None, args, CPU, Execution()), replace(META, config=args.recorded())
