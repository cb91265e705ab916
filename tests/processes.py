"""Several processes that meet through gloo, for tests."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import distributed


def in_processes(count, folder, work, *args):
    """`work(*args)` in each of `count` processes, one thread each; what process 0 returned."""
    mp.spawn(_join, (count, str(folder), work, args), count)
    return torch.load(folder / "result.pt")


def _join(rank, count, folder, work, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    result = work(*copy.deepcopy(args))  # spawn shares the memory of tensors
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    distributed.stop()
