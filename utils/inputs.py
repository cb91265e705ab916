"""What a run computes from: fingerprints of its images and of networks that were trained before."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.sources import DataSet
from utils.config import Config
from utils.errors import UserError

TITLES = {
    "train": "training images",
    "val": "validation images",
    "test": "test images",
    "teacher": "weights of the pretrained teacher",
    "refined": "weights of the student to refine",
}


def describe(dataset: DataSet, data_dir: Path | None, **networks: nn.Module | None) -> dict[str, Any]:
    """A fingerprint of each split and each network, by the keys of TITLES.

    Images in memory are known by their pixels, images that stream by their paths in data_dir.
    """
    return dataset.fingerprints(data_dir) | {name: _weights(network) for name, network in networks.items() if network}


def check_same(was: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Raise a UserError if a run would go on from other images or networks than before, as far as `source` says."""
    for name, title in TITLES.items():
        if name in was and name in now and was[name] != now[name]:
            counts = [f"{side[name]['count']:,}" for side in (was, now) if name in ("train", "val", "test")]
            counts = f" ({', now '.join(counts)})" if counts else ""
            raise UserError(f"{source} was trained with other {title}{counts}: give the same, or go on with --force")


def check_unseen(meta: dict[str, Any], dataset: DataSet, config: Config, source: Path) -> None:
    """Raise a UserError if a network of this project was trained on images of the validation set.

    Args:
        meta: of the network, which `source` holds.
    """
    then = meta["config"]
    if then["dataset"] != config.dataset or config.val_size in (0, then["val_size"]):
        return
    # A folder that has its own val/ gives the same validation images whatever the val_size.
    if meta.get("inputs", {}).get("val") != dataset.val.fingerprint(config.data_dir):
        raise UserError(
            f"--val_size {config.val_size:g}, but {source} was trained with {then['val_size']:g}: it would be "
            f"validated on images that it was trained on; give --val_size {then['val_size']:g}"
        )


def _weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
