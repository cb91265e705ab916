"""A training step as one CUDA graph: its thousands of small kernels without a launch, and without Python, for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Any]  # (images, targets) -> tensors, of which the next call may overwrite the values


class GraphedStep:
    """Calls `step` a few times, then records it and from there on replays the record.

    What is recorded is the step for the first call's batch size; another batch, as the last of an epoch may be, goes
    through `step` itself. All calls are real training steps, so the mathematics is that of `step`. It must read what
    changes from step to step, the learning rate, from memory, and find the optimizer's state there from WARM_UP on.
    """

    WARM_UP = 3  # cuDNN and cuBLAS choose their algorithms, SGD creates its momentum

    def __init__(self, step: Step):
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
            return self._warm_up()
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.outputs

    def _warm_up(self) -> Any:
        side = torch.cuda.Stream()  # off the default stream, as recording is
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self.step(self.images, self.targets)
        torch.cuda.current_stream().wait_stream(side)
        return outputs

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.step(self.images, self.targets)
        self.graph = graph
