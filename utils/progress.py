"""An epoch in the middle: what its steps have given so far, and the random generators."""

from typing import Any

import torch
from torch import Tensor


class Progress:
    """The losses, sizes and correct answers of an epoch's steps so far.

    Attributes:
        position: batches of the epoch that were done with when its state was taken.
        random: the random generators then; None of an epoch from its start.
        losses: of each step that was waited for, the loss and its terms, named by `names`.
        sizes: images of each step.
    """

    def __init__(self):
        self.position = 0
        self.random: dict[str, Tensor] | None = None
        self.names: list[str] = []
        self.losses: list[list[float]] = []
        self.sizes: list[int] = []
        self._correct: Tensor | int = 0
        self._pending: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self.sizes)

    @property
    def images(self) -> int:
        return sum(self.sizes)

    def add(self, losses: dict[str, Tensor], correct: Tensor, size: int) -> None:
        """Add a step, without waiting for the device.

        Args:
            losses: scalars.
            correct: (networks,) counts of correct answers.
            size: images of the step's batch.
        """
        self.names = list(losses)
        self._pending.append(torch.stack(list(losses.values())))
        self._correct = self._correct + correct
        self.sizes.append(size)

    def settle(self) -> list[dict[str, float]]:
        """Wait for the device. Returns the losses of the steps since the last time."""
        rows = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        self.losses += rows
        return [dict(zip(self.names, row, strict=True)) for row in rows]

    def average_losses(self) -> dict[str, float]:
        """Averages over the images of the settled steps, each as it was in its own step."""
        weights = torch.tensor(self.sizes, dtype=torch.float64) / self.images
        averages = weights @ torch.tensor(self.losses, dtype=torch.float64)
        return dict(zip(self.names, averages.tolist(), strict=True))

    def accuracies(self) -> list[float]:
        """Top-1 in % of each network."""
        return [100 * hits / self.images for hits in self._correct.tolist()]

    def state_dict(self, position: int, device: torch.device) -> dict[str, Any]:
        """All that is needed to go on from here, as tensors and plain values; the steps must be settled.

        Args:
            position: batches of the epoch that are done with; more than steps, if some had no readable image.
        """
        return {
            "position": position,
            "random": random_state(device),
            "names": self.names,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "sizes": torch.tensor(self.sizes),
            "correct": self._correct.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.position, self.random, self.names = state["position"], state["random"], state["names"]
        self.losses, self.sizes = state["losses"].tolist(), state["sizes"].tolist()
        self._correct = state["correct"].to(device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators on the CPU and on `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Undo what was drawn since `random_state`; a generator of a device that is not here is left out."""
    torch.set_rng_state(states["cpu"])
    for kind in ("cuda", "mps"):
        if kind in states and getattr(torch, kind).is_available():
            getattr(torch, kind).set_rng_state(states[kind])
