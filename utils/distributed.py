"""One run in many processes, started by torchrun: one process for each device, with its share of every batch.

Without torchrun there is one process, and everything here does nothing. With K processes, process r takes every K-th
image of a batch from the r-th on, DistributedDataParallel averages the gradients, and process 0 alone writes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # with gradients

from utils.errors import UserError


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: torch.device) -> torch.device:
    """Connect to the other processes, if there are any, and return the device of this one.

    Raises:
        UserError: there are more processes than devices, they do not connect, or torchrun did not start them.
    """
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ or _variable("WORLD_SIZE") == 1:
        return device
    _, local_rank = _variable("RANK"), _variable("LOCAL_RANK")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPU(s): lower --nproc_per_node of torchrun")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"torchrun needs --device cuda or cpu, not {device.type}")
    timeout = timedelta(minutes=10)
    try:
        store, this, size = next(dist.rendezvous("env://", timeout=timeout))
        # After a restart it still holds the addresses of the processes before.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=this, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run do not reach each other: {str(error).splitlines()[0]}") from error
    return device


def _variable(name: str) -> int:
    """Read a number that torchrun puts into the environment; raises a UserError if there is none."""
    value = os.environ.get(name)
    try:
        return int(value)
    except (TypeError, ValueError):
        fault = "is not set, but WORLD_SIZE is" if value is None else f"is '{value}', not a number"
        raise UserError(f"{name} {fault}: start one of many processes with torchrun, or unset WORLD_SIZE") from None


def total(values: Tensor) -> Tensor:
    """All-reduce (sum) of a tensor on the CPU or the device."""
    if world_size() > 1:
        dist.all_reduce(values := values.clone())
    return values


def counts(count: int) -> list[int]:
    """The counts (or other whole numbers) of all processes, by rank."""
    if world_size() == 1:
        return [count]
    values = torch.zeros(world_size(), dtype=torch.long)
    values[rank()] = count
    return total(values).tolist()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank; they must be picklable."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def copy_buffers_of_first(network: nn.Module) -> None:
    """Broadcast the buffers of process 0: its running statistics are exported."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def stop() -> None:
    """Wait for the other processes, if there are any, and end this one when all of its work is done.

    It ends without Python's cleanup, in which torch may abort the process while it destroys its process groups.
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


def share(count: int) -> slice:
    """The slice of `count` items that belongs to this process."""
    return slice(rank(), count, world_size())


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Let the first process of a machine go first, so that the others find the files that it downloads."""
    first = world_size() == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        wait_for_all()
    try:
        yield
    finally:
        if first:
            wait_for_all()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that in training takes mean and variance over the batches of all processes, on any device.

    (B, C, ...) -> (B, C, ...); B may differ between processes, with at least one image in all. torch.nn.SyncBatchNorm
    needs GPUs.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        moments = torch.var_mean(values, [0, *range(2, x.dim())], correction=0)
        local = torch.cat([*moments, values.new_tensor([values.numel() / values.shape[1]])])
        # One row of moments for each process, because sums of squares over all of them would cancel.
        rows = all_reduce(nn.functional.pad(local[None], (0, 0, rank(), world_size() - 1 - rank())))
        variances, means, counts = rows.split([self.num_features, self.num_features, 1], dim=1)
        total_count = counts.sum()
        shares = counts / total_count
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean) ** 2)).sum(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total_count / (total_count - 1), self.momentum)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (values * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


def synchronize_batch_norm(network: nn.Module) -> None:
    """Replace every BatchNorm of a network by SyncBatchNorm, with the same state and keys."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm
