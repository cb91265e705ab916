"""How fast students train on this machine, compared with the way the authors' released code computes.

    python experiment/benchmark.py                 # every convolution, against the plain baseline
    python experiment/benchmark.py --scale         # and by the number of students and the batch size
    python experiment/benchmark.py --streaming DIR # instead, CPU time of reading the photographs in DIR/train/<class>

Four ResNet-56 students with an online teacher, random images of 32 x 32, no pretrained teacher. The **plain baseline**
computes as the released code does: PyTorch's operators one by one, float32, NCHW, a Python loop over the students,
shift as a depthwise convolution with one-hot filters, and the accuracy of each student fetched in each step. The steps
of all variants take turns, so that a change in the machine's load affects all of them alike.

Columns: images/s of a training step (forward, loss, backward, SGD; median) and its ratio to the baseline; images/s of
steps with data and augmentation, and of an evaluation (float32, batches of 100); peak memory of a step on top of what
is allocated before it; and the roofline, the least time for the step's arithmetic and for its memory traffic as shares
of the measured time:

- arithmetic: three times the multiply-accumulates of the forward pass (forward, gradients of input and weights), at the
  rate of a large matrix product in the same precision;
- traffic: ten times the size of all maps before a BatchNorm, the least that BatchNorm's two passes and their gradients
  allow, at the rate of a large copy.
"""

import argparse
import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import options  # before torch: utils undoes settings of OpenMP

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import AugmentedBatches, Batches
from data.sources import Split
from model import build, fused
from model.conv import KINDS, Shift2d
from model.online import OnlineTeacher
from utils.cost import count, time_in_turn
from utils.device import GraphedStep, apply_execution, describe, pick_device, pick_execution, pick_precision
from utils.engine import Trainer
from utils.metrics import evaluate

CLASSES = 10
LAMBDA, TEMPERATURE, RATE = 0.1, 4.0, 1e-3


class Setting(NamedTuple):
    conv: str
    num_students: int = 4
    batch_size: int = 128

    def learner(self) -> OnlineTeacher:
        torch.manual_seed(0)
        students = [build("resnet_56_sparse", CLASSES, self.conv) for _ in range(self.num_students)]
        return OnlineTeacher(students, CLASSES)


class Machine(NamedTuple):
    """operations: per s of a large matrix product, by precision; bytes: read and written per s by a large copy."""

    operations: dict[str, float]
    bytes: float


class Baseline:
    """The training step as released."""

    name, precision = "plain baseline", "fp32"

    def __init__(self, setting: Setting, device: torch.device):
        self.learner = setting.learner().to(device)
        for module in list(self.learner.modules()):
            if isinstance(getattr(module, "spatial", None), Shift2d):
                module.spatial = module.spatial.as_conv().to(device)
        self.optimizer = torch.optim.SGD(self.learner.parameters(), RATE, 0.9, weight_decay=2e-4)

    def step(self, images: Tensor, targets: Tensor) -> None:
        fused.disable()
        student_logits, teacher_logits = self.learner(images.contiguous())
        loss = F.cross_entropy(teacher_logits, targets)
        soft = F.softmax(teacher_logits / TEMPERATURE, dim=-1)
        for logits in student_logits:
            log_soft = F.log_softmax(logits / TEMPERATURE, dim=-1)
            loss = loss + F.cross_entropy(logits, targets)
            loss = loss + LAMBDA * TEMPERATURE**2 * F.kl_div(log_soft, soft, reduction="batchmean")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for logits in student_logits:
            (logits.argmax(-1) == targets).float().mean().item()


class Ours:
    """The training step of main.py."""

    def __init__(self, setting: Setting, device: torch.device, precision: str, compile: str):
        flags = f"--lr {RATE} --lambda {LAMBDA} --temperature {TEMPERATURE} --num_epochs 1 --warmup_epochs 0"
        config = options.parse("main", flags.split())
        self.device, self.precision, self.execution = device, precision, pick_execution(compile, precision, device)
        self.name = f"{precision}, {self.execution}"
        self.trainer = Trainer(setting.learner(), None, config, device, self.execution)
        self.learner = self.trainer.learner.train()

    def step(self, images: Tensor, targets: Tensor) -> None:
        apply_execution(self.execution)
        self.trainer.step(images, targets)

    def data_rates(self, batch_size: int, num_batches: int = 6) -> tuple[float, float]:
        """Images/s of training steps and of an evaluation, data and augmentation included."""
        count = batch_size * num_batches
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
        split = Split(pixels, np.arange(count) % CLASSES)
        mean, std = (0.5,) * 3, (0.25,) * 3
        train = AugmentedBatches(split, batch_size, mean, std, self.device, padding=4, flip=True, seed=0)
        test = Batches(split, 100, mean, std, self.device)

        def epoch() -> None:
            for images, targets in train:
                self.step(images, targets)

        calls = (epoch, lambda: evaluate(self.learner, test))
        seconds = np.median(time_in_turn(calls, self.device, rounds=3, warm_up=0), axis=1)
        self.learner.train()
        return tuple(count / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convs", nargs="+", choices=KINDS, default=KINDS, help="(default: all)")
    parser.add_argument("--steps", type=int, help="timed steps (default: 5 on a CPU, 20 elsewhere)")
    parser.add_argument("--scale", action="store_true", help="also 1 to 8 students, batches of 64 to 1024")
    parser.add_argument("--streaming", type=Path, metavar="DIR", help="measure the reading of photographs instead")
    parser.add_argument("--compile", choices=("auto", "on"), default="auto", help="of main.py (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="of main.py (default: %(default)s)")
    args = parser.parse_args()
    if args.streaming:
        from experiment import loading

        print(f"{describe(torch.device('cpu'))}; torch {torch.__version__}; medians of 3 passes over 300 photographs\n")
        rows = loading.compare(args.streaming, images=300, rounds=3)
        print_table(("", "pipeline", "CPU, us/image", "ours / it"), rows, left=2)
        return
    device = pick_device(args.device)
    steps = args.steps or (5 if device.type == "cpu" else 20)
    precisions = list(dict.fromkeys(["fp32", pick_precision("auto", device)]))

    machine = measure_machine(device, precisions)
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in machine.operations.items())
    print(f"{describe(device)}; torch {torch.__version__}; medians of {steps} steps, in turn")
    print(f"a large matrix product: {rates}; a large copy: {machine.bytes / 1e9:,.1f} GB/s\n")
    titles = ("conv", "variant", "images/s", "ratio", "with data", "evaluation", "memory", "arithmetic", "traffic")
    rows = (row for conv in args.convs for row in compare(Setting(conv), args.compile, steps, device, machine))
    print_table(titles, rows, left=2)
    if args.scale:
        settings = [Setting("depthwise", num_students=n) for n in (1, 2, 4, 8)]
        settings += [Setting("depthwise", batch_size=b) for b in (64, 128, 256, 512, 1024)]
        rows = (scale(setting, precisions[-1], args.compile, steps, device) for setting in settings)
        print()
        print_table(("students", "batch", "images/s", "students x images/s"), rows)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0) -> None:
    """Print a Markdown table, each row once it is measured; the first `left` columns are aligned left."""
    for row in chain((titles, ["---"] * left + ["--:"] * (len(titles) - left)), rows):
        print(f"| {' | '.join(row)} |", flush=True)


def compare(setting: Setting, compile: str, steps: int, device: torch.device, machine: Machine) -> Iterator[list[str]]:
    """A row of the table for the baseline, and one for each precision."""
    variants = [Baseline(setting, device), *(Ours(setting, device, name, compile) for name in machine.operations)]
    batch, (operations, elements) = noise(setting.batch_size, device), work(setting)
    times = step_seconds(variants, setting, steps, device)
    for variant, seconds in zip(variants, times, strict=True):
        rates = variant.data_rates(setting.batch_size) if isinstance(variant, Ours) else ()
        memory = peak_memory(partial(variant.step, *batch), device)
        traffic = 10 * elements * (2 if variant.precision == "bf16" else 4)
        yield [
            setting.conv,
            variant.name,
            f"{setting.batch_size / seconds:,.1f}",
            f"{times[0] / seconds:.2f}x",
            *([f"{rate:,.1f}" for rate in rates] or ["-", "-"]),
            "-" if memory is None else f"{memory / 2**30:.2f} GiB",
            f"{operations / machine.operations[variant.precision] / seconds:.0%}",
            f"{traffic / machine.bytes / seconds:.0%}",
        ]


def scale(setting: Setting, precision: str, compile: str, steps: int, device: torch.device) -> list[str]:
    """A row of the table by number of students and batch size."""
    (seconds,) = step_seconds([Ours(setting, device, precision, compile)], setting, steps, device)
    rate, students = setting.batch_size / seconds, setting.num_students
    return [str(students), str(setting.batch_size), f"{rate:,.1f}", f"{rate * students:,.1f}"]


def step_seconds(variants: list[Baseline | Ours], setting: Setting, steps: int, device: torch.device) -> list[float]:
    """Median seconds of a step of each variant."""
    batch = noise(setting.batch_size, device)
    warm_up = 2 if device.type == "cpu" else GraphedStep.WARM_UP + 1
    times = time_in_turn([partial(variant.step, *batch) for variant in variants], device, steps, warm_up)
    return np.median(times, axis=1).tolist()


def noise(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(batch_size, device=device) % CLASSES


def work(setting: Setting) -> tuple[float, float]:
    """Floating-point operations of a step, and elements of the maps before all BatchNorms."""
    learner, elements = setting.learner(), []
    for module in learner.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, __: elements.append(inputs[0].numel()))
    macs = count(learner, (3, 32, 32)).macs  # with a forward pass, which the hooks see
    return 3 * 2 * macs * setting.batch_size, sum(elements) * setting.batch_size


def measure_machine(device: torch.device, precisions: list[str]) -> Machine:
    size, numbers = (4096, 2**26) if device.type == "cpu" else (8192, 2**28)
    rates = {}
    for precision in precisions:
        a = torch.randn(size, size, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        rates[precision] = 2 * size**3 / best_of(lambda a=a: a @ a, device)
    a = torch.randn(numbers, device=device)
    b = torch.empty_like(a)
    return Machine(rates, 2 * a.nbytes / best_of(lambda: b.copy_(a), device))  # it reads and writes


def best_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of six calls."""
    (times,) = time_in_turn([call], device, rounds=6, warm_up=0)
    return min(times)


def peak_memory(call: Callable[[], None], device: torch.device) -> int | None:
    """Peak memory of a call in bytes, on top of what is allocated before; None where it cannot be measured."""

    def resident(name: str) -> int:
        return 1024 * int(re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the recorded peak
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


if __name__ == "__main__":
    main()
