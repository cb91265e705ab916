"""Normalizations of images: mean and std of each channel, for pixels in 0 .. 1."""

from collections.abc import Sequence

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std

NORMALIZATIONS: dict[str, MeanStd] = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # the recipe of the released code
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),  # weiaicunzai/pytorch-cifar100
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def parse(text: str) -> MeanStd:
    """One of NORMALIZATIONS by name, or "mean,mean,mean/std,std,std".

    Raises:
        ValueError: it is neither.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
    if not is_plausible(mean, std):
        raise ValueError("not three means and three positive standard deviations")
    return mean, std


def describe(normalization: MeanStd) -> str:
    """The inverse of `parse`."""
    same = (name for name, known in NORMALIZATIONS.items() if known == normalization)
    return next(same, "/".join(",".join(f"{value:.4g}" for value in part) for part in normalization))


def is_plausible(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether they are three means and three standard deviations that one can divide by."""
    return len(mean) == len(std) == 3 and all(-1e3 < x < 1e3 for x in mean) and all(1e-3 < x < 1e3 for x in std)
