"""Which device, precision and code a run computes with: the pick functions choose, `apply_execution` applies."""

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import fused
from utils import distributed
from utils.errors import UserError

SHARED = 0.7  # share of the cores' time below which other processes use them, too
# The folder and the files with the CPU quota, "150000 100000", by the controller of a cgroup: versions 1 and 2.
QUOTAS = {"cpu": ("sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"), "": ("sys/fs/cgroup", "cpu.max")}
# The ways to run a training step.
PLAIN, KERNELS, GRAPH, COMPILED = "PyTorch's operators", "fused kernels", "a CUDA graph", "a compiled CUDA graph"


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(kind for kind, available in kinds.items() if available))
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown --device {name}: choose auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not usable here ({str(error).splitlines()[0]}): try auto") from error
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Return "fp32" or "bf16"; "auto" is bf16 where the device has units for it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if native else "fp32"


@dataclass(frozen=True)
class Execution:
    """How to run the training step: PLAIN, KERNELS, GRAPH or COMPILED; "fp32" or "bf16"."""

    code: str = PLAIN
    precision: str = "fp32"
    remark: str = ""  # why faster code cannot be used
    tunes_cudnn: bool = False  # cuDNN times its algorithms, which pays since all batches have one shape

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which networks compute: BatchNorm statistics, losses and the optimizer stay float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def __str__(self) -> str:
        return self.code + (f" ({self.remark})" if self.remark else "")


def pick_execution(name: str, precision: str, device: torch.device) -> Execution:
    """Choose how to run the training step, from --compile and --precision; `apply_execution` applies it.

    "auto" is the fastest that is worth its preparation: on the CPU the fused kernels, which compile in seconds, where
    there is a compiler; on CUDA a graph of the step. "on" insists, and on CUDA also compiles the networks with
    torch.compile, which takes minutes. "off" is PyTorch's operators one by one.

    Raises:
        UserError: "on" is impossible here.
    """
    precision = pick_precision(precision, device)
    if name == "off":
        return Execution(PLAIN, precision)
    if device.type == "cuda":
        if distributed.world_size() == 1:
            return Execution(COMPILED if name == "on" else GRAPH, precision, tunes_cudnn=True)
        if name == "on":
            raise UserError("--compile on is for one process: leave it out under torchrun")
        return Execution(PLAIN, precision, tunes_cudnn=True)
    try:
        if device.type != "cpu":
            raise fused.KernelsUnavailable(f"there are none for {device.type}")
        fused.load()
    except fused.KernelsUnavailable as error:
        if name == "on":
            raise UserError(f"--compile on has no fused kernels: {error}; use auto or off") from error
        return Execution(PLAIN, precision, remark=f"no fused kernels: {error}")
    return Execution(KERNELS, precision)


def apply_execution(execution: Execution) -> None:
    """Set up this process: the kernels, cuDNN, the C library's memory, and the number of threads."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())  # more than a container's CPU quota would wait for each other
    torch.backends.cudnn.benchmark = execution.tunes_cudnn
    if execution.code == KERNELS:
        fused.enable()
        _keep_freed_memory()
    else:
        fused.disable()


def contention(device: torch.device, seconds: float = 0.1) -> list[str]:
    """A line for the log if other processes use the cores of this process's threads.

    OpenMP's threads wait actively for each other. On free cores that is fastest (OMP_WAIT_POLICY=passive took 2 to 3
    times as long); on shared ones, a training step took 2 to 8 times as long with two threads as with one.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return []
    values = torch.zeros(2**16)
    values.add_(1)  # starts the threads
    wall, cpu = time.perf_counter(), time.process_time()
    while (waited := time.perf_counter() - wall) < seconds:
        values.add_(1)
    share = (time.process_time() - cpu) / (waited * threads)
    if share > SHARED:
        return []
    return [
        f"other processes are using the CPU (this one gets {share:.0%} of {threads} cores), and its {threads} threads "
        "wait for each other: OMP_NUM_THREADS=1 is probably faster"
    ]


def _keep_freed_memory() -> None:
    """Keep freed memory for the next step: with a batch of 1,024, to get new pages took longer than the arithmetic."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
            mallopt(-4, 0)  # M_MMAP_MAX: no block gets its own mapping


def environment(device: torch.device, execution: Execution) -> dict[str, Any]:
    """Everything besides flags and data that may change the last bits of a run's results, for checkpoints."""
    return {
        "device": _hardware(device),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "precision": execution.precision,
        "execution": str(execution),
        "kernels": fused.kernels_hash(),
        "torch": str(torch.__version__),
    }


def changes(was: dict[str, Any], now: dict[str, Any]) -> str:
    """For a log line: how the environment of a resumed run differs from that of its checkpoint."""
    differing = [name for name in now if name in was and was[name] != now[name]]
    changed = [f"{name} {now[name] or 'none'} (was {was[name] or 'none'})" for name in differing]
    return f", with {', '.join(changed)}: results may differ in the last bits" if changed else ""


def describe(device: torch.device) -> str:
    """The hardware, for logs and reports."""
    return _hardware(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name", "CPU") if device.type == "cpu" else device.type


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's random generators on the CPU and on `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned, except generators of devices that this machine lacks."""
    torch.set_rng_state(states["cpu"])
    for kind in ("cuda", "mps"):
        if kind in states and getattr(torch, kind).is_available():
            getattr(torch, kind).set_rng_state(states[kind])


class GraphedStep:
    """Replays a training step as one CUDA graph, which removes the launch overhead of its thousands of small kernels.

    The first WARM_UP calls run `step` itself, the next one records it. The graph is for the batch size of the first
    call; batches of another size, such as the last of an epoch, go through `step`. All calls are real training steps.
    Values that change from step to step, such as the learning rate, must be read from memory on the device. A call may
    overwrite the tensors that the one before it returned.
    """

    WARM_UP = 3  # cuDNN and cuBLAS choose their algorithms, SGD creates its momentum

    def __init__(self, step: Callable[[Tensor, Tensor], Any]):
        self.step = step
        self.calls, self.graph = 0, None

    def __call__(self, images: Tensor, targets: Tensor) -> Any:
        if self.calls == 0:
            self.images, self.targets = torch.empty_like(images), torch.empty_like(targets)
        if images.shape != self.images.shape:
            return self.step(images, targets)
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            side = torch.cuda.Stream()  # on another stream than the default, as in recording
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                outputs = self.step(self.images, self.targets)
            torch.cuda.current_stream().wait_stream(side)
            return outputs
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = self.step(self.images, self.targets)
            self.graph = graph
        self.graph.replay()
        return self.outputs


def cores(root: Path = Path("/")) -> int:
    """Number of CPU cores for this process: those it may run on, up to the CPU quota of its cgroups.

    The processes that torchrun starts on one machine share them.

    Args:
        root: folder with proc/ and sys/.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # on this machine
    return max(1, math.ceil(min([allowed, *_quotas(root)])) // processes)


def _quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in cores, of the cgroup of this process and of those above it."""
    with suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in QUOTAS.keys() & controllers.split(","):
                mount, *files = QUOTAS[controller]
                folder = root / mount / path.lstrip("/")  # in a container it may be missing below its mount
                for cgroup in (folder, *folder.parents):
                    with suppress(OSError, ValueError):  # there is no such file, or the quota is "max"
                        quota, period = map(int, " ".join((cgroup / name).read_text() for name in files).split())
                        if quota > 0:  # version 1 has -1 for no quota
                            yield quota / period
