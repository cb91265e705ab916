"""Which device, precision and code a run computes with."""

import ctypes
import os
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from model import fused
from utils import distributed
from utils.cores import cores
from utils.errors import UserError

# The ways to run a training step.
PLAIN, KERNELS, GRAPH, COMPILED = "PyTorch's operators", "fused kernels", "a CUDA graph", "a compiled CUDA graph"


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        UserError: no such device here.
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
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    else:
        native = False
    return "bf16" if native else "fp32"


def pick_execution(name: str, device: torch.device) -> str:
    """How to run the training step, by --compile: one of the above, perhaps with a remark in parentheses.

    "auto" is the fastest that is certain to be worth its preparation: on the CPU the fused kernels, which compile in
    seconds, where there is a compiler; on CUDA a graph of the step. "on" insists, and on CUDA compiles the networks
    with torch.compile as well, which takes minutes. "off" is PyTorch's operators one by one.

    Raises:
        UserError: "on", and it cannot be done here.
    """
    fused.disable()
    if "OMP_NUM_THREADS" not in os.environ:
        _limit_threads(cores())
    if name == "off":
        return PLAIN
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        if distributed.world_size() > 1:
            if name == "on":
                raise UserError("--compile on is for one process: leave it out under torchrun")
            return PLAIN
        return COMPILED if name == "on" else GRAPH
    try:
        if device.type != "cpu":
            raise fused.KernelsUnavailable(f"there are none for {device.type}")
        fused.enable()
        _keep_freed_memory()
    except fused.KernelsUnavailable as error:
        if name == "on":
            raise UserError(f"--compile on has no fused kernels: {error}; use auto or off") from error
        return f"{PLAIN} (no fused kernels: {error})"
    return KERNELS


def _limit_threads(cores: int) -> None:
    """More threads than a container's CPU quota has cores would wait for each other most of the time."""
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def _keep_freed_memory() -> None:
    """Let the next step have the memory that a step frees.

    glibc returns large blocks to the system, which hands them out again page by page, zeroed: with a batch of 1,024
    that took longer than the arithmetic.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
            mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks compute: BatchNorm statistics, losses and the optimizer stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def environment(device: torch.device, precision: str, execution: str) -> dict[str, Any]:
    """What the last bits of a run's results depend on, besides its flags and its data."""
    return {
        "device": _hardware(device),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "execution": execution,
        "kernels": fused.kernels_hash(),
        "torch": str(torch.__version__),
    }


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
    """Restore what `random_state` returned; the generator of a device that is not here is left out."""
    torch.set_rng_state(states["cpu"])
    for kind in ("cuda", "mps"):
        if kind in states and getattr(torch, kind).is_available():
            getattr(torch, kind).set_rng_state(states[kind])
