"""How fast students train here, and how fast they could.

    python experiment/benchmark.py                 # every convolution, against the plain baseline
    python experiment/benchmark.py --scale         # and by the number of students and the batch size
    python experiment/benchmark.py --json > benchmark.json

Four ResNet-56 students with an online teacher, images of 32 x 32 made of noise, no pretrained teacher. The **plain
baseline** is what the authors' released code does: PyTorch's operators one by one, float32, NCHW, a Python loop over
the students, shift as a depthwise convolution with one-hot filters, and the accuracy of each student fetched in each
step. Steps of all variants are timed in turn, so that a change in the machine's load meets all of them.

Columns: images/s of a training step (forward, loss, backward, SGD; median) and its ratio to the baseline; images/s of
an epoch with data and augmentation, and of an evaluation (float32, batches of 100); the share of the step that is not
forward and backward of the networks; the memory that a step takes on top of what is there before it; and the roofline,
the least time that the step needs by its arithmetic and by its memory traffic as a share of the time that it took:

- arithmetic: three times the multiply-accumulates of the forward pass (forward, gradient of the input, gradient of the
  weights), at the rate of a large matrix product in the same precision;
- memory: a map before a BatchNorm and the one after it are written, read, and their gradients written and read so often
  that ten times the size of the former is the least that BatchNorm's two passes leave possible, at the rate of a large
  copy.
"""

import argparse
import copy
import ctypes
import io
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import AugmentedBatches, Batches
from data.sources import Split
from model import build, fused
from model.conv import KINDS, Shift2d
from model.online import OnlineTeacher
from utils import options
from utils.cost import count, time_in_turn
from utils.device import COMPILED, GRAPH, autocast, describe, pick_device, pick_execution, pick_precision
from utils.engine import Trainer
from utils.evaluation import evaluate
from utils.graphs import GraphedStep
from utils.job import Job

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


class Baseline:
    """The training step as released."""

    name, precision, graphed = "plain baseline", "fp32", False

    def __init__(self, setting: Setting, device: torch.device):
        self.learner = setting.learner().to(device)
        for module in list(self.learner.modules()):
            if isinstance(getattr(module, "spatial", None), Shift2d):
                module.spatial = one_hot_shift(module.spatial).to(device)
        weights = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(weights, RATE, 0.9, weight_decay=2e-4)

    def prepare(self) -> None:
        fused.disable()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.learner(images.contiguous())

    def step(self, images: Tensor, targets: Tensor) -> None:
        student_logits, teacher_logits = self.forward(images)
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
        flags = {"lr": RATE, "lambda": LAMBDA, "temperature": TEMPERATURE, "num_epochs": 1, "warmup_epochs": 0}
        self.args = options.parse("main", [text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
        self.device, self.compile, self.precision = device, compile, precision
        execution = pick_execution(compile, device)
        self.name, self.graphed = f"{precision}, {execution}", execution in (GRAPH, COMPILED)
        self.trainer = Trainer(setting.learner(), None, self.args, device, precision, execution)
        self.learner = self.trainer.learner.train()

    def prepare(self) -> None:
        pick_execution(self.compile, self.device)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.precision):
            return self.trainer.forward(images)

    def step(self, images: Tensor, targets: Tensor) -> None:
        self.trainer.train_step(images, targets)

    def epoch(self, batches: AugmentedBatches) -> None:
        """With everything that an epoch of main.py does but validation and checkpoints."""
        self.trainer.epoch += 1
        batches.set_epoch(self.trainer.epoch)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            job = Job(Path(folder), self.args.recorded())
            job.open(None, 0, reset=False)
            self.trainer.train_one_epoch(batches, job)
            job.close()


def one_hot_shift(shift: Shift2d) -> nn.Conv2d:
    channels, size = shift.channels, shift.kernel_size[0]
    conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
    nn.init.zeros_(conv.weight)
    for c in range(channels):
        moved = c < channels - channels % size**2
        conv.weight.data[c, 0, c // size % size if moved else size // 2, c % size if moved else size // 2] = 1
    conv.weight.requires_grad_(False)
    return conv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convs", nargs="+", choices=KINDS, default=KINDS, help="(default: all)")
    parser.add_argument("--steps", type=int, help="timed steps (default: 5 on a CPU, 20 elsewhere)")
    parser.add_argument("--scale", action="store_true", help="also 1 to 8 students, batches of 64 to 1024")
    parser.add_argument("--compile", choices=("auto", "on"), default="auto", help="of main.py (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="of main.py (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    args = parser.parse_args()
    device = pick_device(args.device)
    steps = args.steps or (5 if device.type == "cpu" else 20)
    precisions = dict.fromkeys(["fp32", pick_precision("auto", device)])

    machine = measure_machine(device, precisions)
    results = []
    for conv in args.convs:
        setting = Setting(conv)
        variants = [Baseline(setting, device), *(Ours(setting, device, p, args.compile) for p in precisions)]
        results += compare(setting, variants, steps, device, machine)
    scaled = []
    if args.scale:
        settings = [Setting("depthwise", num_students=n) for n in (1, 2, 4, 8)]
        settings += [Setting("depthwise", batch_size=b) for b in (64, 128, 256, 512, 1024)]
        for setting in settings:
            ours = Ours(setting, device, list(precisions)[-1], args.compile)
            batch = noise(setting.batch_size, device)
            (seconds,) = medians([ours], lambda variant, batch=batch: variant.step(*batch), steps, device)
            rate = setting.batch_size / seconds
            scaled.append(setting._asdict() | {"variant": ours.name, "images_per_second": rate})
    if args.json:
        print(json.dumps({"machine": machine, "steps": steps, "results": results, "scale": scaled}, indent=2))
    else:
        print_tables(machine, steps, results, scaled)


def compare(
    setting: Setting, variants: list[Baseline | Ours], steps: int, device: torch.device, machine: dict[str, Any]
) -> list[dict[str, Any]]:
    """One record for each variant, the baseline first."""
    images, targets = noise(setting.batch_size, device)
    times = medians(variants, lambda variant: variant.step(images, targets), steps, device)
    model_times = medians(variants, lambda variant: forward_backward(variant, images), steps, device)
    operations, elements = work(setting)
    records = []
    for variant, seconds, model_seconds in zip(variants, times, model_times, strict=True):
        variant.prepare()
        epoch, evaluation = data_rates(setting, variant, device) if isinstance(variant, Ours) else (None, None)
        least_traffic = 10 * elements * (2 if variant.precision == "bf16" else 4)
        records.append(
            {
                "conv": setting.conv,
                "variant": variant.name,
                "step_seconds": seconds,
                "images_per_second": setting.batch_size / seconds,
                "ratio": times[0] / seconds,
                "epoch_images_per_second": epoch,
                "evaluation_images_per_second": evaluation,
                # Inside of a graph nothing can be timed apart.
                "outside_model": None if variant.graphed else max(0.0, 1 - model_seconds / seconds),
                "peak_memory_bytes": peak_memory(lambda variant=variant: variant.step(images, targets), device),
                "roofline_arithmetic": operations / machine["operations_per_second"][variant.precision] / seconds,
                "roofline_memory": least_traffic / machine["bytes_per_second"] / seconds,
            }
        )
    return records


def medians(
    variants: list[Baseline | Ours], run: Callable[[Baseline | Ours], None], steps: int, device: torch.device
) -> list[float]:
    """Median seconds of a run of each variant."""

    def call(variant: Baseline | Ours) -> None:
        variant.prepare()
        run(variant)

    warm_up = 2 if device.type == "cpu" else GraphedStep.WARM_UP + 1
    times = time_in_turn([partial(call, variant) for variant in variants], device, steps, warm_up)
    return [statistics.median(taken) for taken in times]


def data_rates(setting: Setting, variant: Ours, device: torch.device, num_batches: int = 6) -> tuple[float, float]:
    """Images/s of an epoch of training and of an evaluation, data and augmentation included."""
    count = setting.batch_size * num_batches
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % CLASSES)
    mean, std = (0.5,) * 3, (0.25,) * 3
    train = AugmentedBatches(split, setting.batch_size, mean, std, device, padding=4, flip=True, seed=0)
    test = Batches(split, variant.args.eval_batch_size, mean, std, device)
    runs = (lambda: variant.epoch(train), lambda: evaluate(variant.learner, test))
    epoch, evaluation = (count / statistics.median(taken) for taken in time_in_turn(runs, device, rounds=3, warm_up=0))
    variant.learner.train()
    return epoch, evaluation


def forward_backward(variant: Baseline | Ours, images: Tensor) -> None:
    logits = variant.forward(images)
    torch.autograd.backward(logits, [torch.ones_like(x) for x in logits])
    variant.learner.zero_grad()


def noise(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(batch_size, device=device) % CLASSES


def work(setting: Setting) -> tuple[float, float]:
    """Floating-point operations of a step, and elements of the maps before all BatchNorms."""
    learner = setting.learner()
    operations = 3 * 2 * count(learner, (3, 32, 32)).macs * setting.batch_size
    elements = []
    for module in learner.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, __: elements.append(inputs[0].numel()))
    with torch.no_grad():
        copy.deepcopy(learner).to("meta")(torch.empty(1, 3, 32, 32, device="meta"))
    return operations, sum(elements) * setting.batch_size


def measure_machine(device: torch.device, precisions: dict[str, None]) -> dict[str, Any]:
    """Rates of a large matrix product and of a large copy, which reads and writes."""
    size, numbers = (4096, 2**26) if device.type == "cpu" else (8192, 2**28)
    rates = {}
    for precision in precisions:
        a = torch.randn(size, size, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        rates[precision] = 2 * size**3 / best_of(lambda a=a: a @ a, device)
    a = torch.randn(numbers, device=device)
    b = torch.empty_like(a)
    return {
        "device": describe(device),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "operations_per_second": rates,
        "bytes_per_second": 2 * a.nbytes / best_of(lambda: b.copy_(a), device),
    }


def best_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of six calls."""
    (taken,) = time_in_turn([call], device, rounds=6, warm_up=0)
    return min(taken)


def peak_memory(call: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that a call takes at its peak on top of what is there before; None where this is not known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = _resident("VmRSS")
        call()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def print_tables(
    machine: dict[str, Any], steps: int, results: list[dict[str, Any]], scaled: list[dict[str, Any]]
) -> None:
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in machine["operations_per_second"].items())
    print(f"{machine['device']}; torch {machine['torch']}; medians of {steps} steps, in turn")
    print(f"a large matrix product: {rates}; a large copy: {machine['bytes_per_second'] / 1e9:,.1f} GB/s\n")
    titles = ["conv", "variant", "images/s", "ratio", "with data", "evaluation", "outside", "memory"]
    lines = [[*titles, "arithmetic", "traffic"]]
    for r in results:
        known = {
            "epoch_images_per_second": "{:,.1f}".format,
            "evaluation_images_per_second": "{:,.1f}".format,
            "outside_model": "{:.1%}".format,
            "peak_memory_bytes": lambda size: f"{size / 2**30:.2f} GiB",
        }
        cells = [show(r[key]) if r[key] is not None else "-" for key, show in known.items()]
        line = [r["conv"], r["variant"], f"{r['images_per_second']:,.1f}", f"{r['ratio']:.2f}x", *cells]
        lines.append([*line, f"{r['roofline_arithmetic']:.0%}", f"{r['roofline_memory']:.0%}"])
    print_table(lines, left=2)
    if scaled:
        lines = [["students", "batch", "images/s", "students x images/s"]]
        for r in scaled:
            rate, count = r["images_per_second"], r["num_students"]
            lines.append([str(count), str(r["batch_size"]), f"{rate:,.1f}", f"{rate * count:,.1f}"])
        print(f"\n{scaled[0]['conv']}, {scaled[0]['variant']}")
        print_table(lines, left=0)


def print_table(lines: list[list[str]], left: int) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = enumerate(zip(line, widths, strict=True))
        cells = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in padded]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
