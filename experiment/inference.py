"""How fast ResNet-20 students classify on a CPU, compared with their standard network.

    python experiment/inference.py                               # all threads, images of 32 x 32 and 8 x 8
    python experiment/inference.py --threads 1 --sizes 32

Networks in eval mode (float32, channels_last, inference_mode) by PyTorch's operators and with the fused kernels, and
their exported ONNX files in ONNX Runtime, at batch 1 and 256; medians. All networks of a runtime take turns, so that a
change in the machine's load affects all of them alike. A ratio says how many times as fast a network is as the standard
one by PyTorch's operators, or in ONNX Runtime.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import export  # before torch: utils undoes settings of OpenMP

# isort: split
import torch
from torch import Tensor, nn

from model import build, fused
from model.conv import KINDS
from utils.cost import time_in_turn
from utils.device import describe

CLASSES = 10
PYTORCH, KERNELS, ONNX = "PyTorch", "kernels", "ONNX Runtime"
CPU = torch.device("cpu")
Calls = dict[tuple[str, str], Callable[[], object]]  # by network and runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 8], help="of the images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, nargs=2, default=[100, 15], help="batch 1, 256 (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    networks = {"standard": build("resnet_20", CLASSES)}
    networks |= {conv: build("resnet_20_sparse", CLASSES, conv) for conv in KINDS}
    for network in networks.values():
        network.eval().to(memory_format=torch.channels_last)
    print(f"{describe(CPU)}; torch {torch.__version__}; ONNX Runtime {export.runtime_version()}\n")
    print("| images | network | by | batch 1, ms | ratio | batch 256, ms | ratio |\n|--:|---|---|--:|--:|--:|--:|")
    for size in args.sizes:
        results = [{}, {}]  # ms by network and runtime, for each batch size
        for times, batch_size, rounds in zip(results, (1, 256), args.rounds, strict=True):
            images = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
            # One runtime after the other: their threads would compete for the cores.
            for calls in (in_pytorch(networks, images), in_onnx(networks, images)):
                taken = time_in_turn(list(calls.values()), CPU, rounds)
                times |= zip(calls, (1e3 * statistics.median(seconds) for seconds in taken), strict=True)
        for name, by in results[0]:
            base = "standard", ONNX if by == ONNX else PYTORCH
            cells = [f"{times[name, by]:.2f} | {times[base] / times[name, by]:.2f}x" for times in results]
            print(f"| {size} x {size} | {name} | {by} | {' | '.join(cells)} |")


def in_pytorch(networks: dict[str, nn.Module], images: Tensor) -> Calls:
    def compute(network: nn.Module, switch: Callable[[], None]) -> None:
        switch()
        with torch.inference_mode():
            network(images)

    switches = {PYTORCH: fused.disable, KERNELS: fused.enable}
    return {(name, by): partial(compute, net, switches[by]) for name, net in networks.items() for by in switches}


def in_onnx(networks: dict[str, nn.Module], images: Tensor) -> Calls:
    meta = {"input_size": images.shape[1:], "mean": [0.5] * 3, "std": [0.25] * 3}
    graphs = {name: export.fold(network, meta) for name, network in networks.items()}
    sessions = {name: export.session(export.to_onnx(graph, meta)) for name, graph in graphs.items()}
    pixels = images.contiguous().numpy()
    return {(name, ONNX): partial(session, pixels) for name, session in sessions.items()}


if __name__ == "__main__":
    main()
