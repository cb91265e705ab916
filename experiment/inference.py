"""How fast ResNet-20 students classify on a CPU, against their standard network.

    python experiment/inference.py                               # all threads, images of 32 x 32 and 8 x 8
    python experiment/inference.py --threads 1 --sizes 32

Every network as it is (eval mode, inference_mode, float32, channels_last), by PyTorch's operators and with the fused
kernels, at batch 1 and 256. All of them take turns, so that a change in the machine's load meets all; medians. A ratio
says how many times as fast as the standard network by PyTorch's operators.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from model import build, fused
from model.conv import KINDS
from utils.device import describe

CLASSES = 10
Times = dict[tuple[str, bool], float]  # ms by network and whether the kernels were on


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
    print(f"{describe(torch.device('cpu'))}; torch {torch.__version__}\n")
    print("| images | network | by | batch 1, ms | ratio | batch 256, ms | ratio |\n|--:|---|---|--:|--:|--:|--:|")
    for size in args.sizes:
        results = [measure(networks, size, *pair) for pair in zip((1, 256), args.rounds, strict=True)]
        for network, kernels in results[0]:
            cells = [f"{times[network, kernels]:.2f} | {ratio(times, network, kernels):.2f}x" for times in results]
            print(f"| {size} x {size} | {network} | {'kernels' if kernels else 'PyTorch'} | {' | '.join(cells)} |")


def measure(networks: dict[str, nn.Module], size: int, batch_size: int, rounds: int) -> Times:
    images = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    taken = {(name, kernels): [] for name in networks for kernels in (False, True)}
    with torch.inference_mode():
        for i in range(2 + rounds):
            for (name, kernels), times in taken.items():
                fused.enable() if kernels else fused.disable()
                started = time.perf_counter()
                networks[name](images)
                if i >= 2:
                    times.append(1e3 * (time.perf_counter() - started))
    return {variant: statistics.median(times) for variant, times in taken.items()}


def ratio(times: Times, network: str, kernels: bool) -> float:
    return times["standard", False] / times[network, kernels]


if __name__ == "__main__":
    main()
