"""Reconstruction: cheap convolutions are fitted to the outputs of the standard ones, layer by layer, on images."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.conv import CheapConv2d
from model.convert import replaced
from model.shift import Shift2d, pad_same

POSITIONS = 10_000  # of each feature map, over all images, drawn at random
ROUNDS = 10  # of alternating least squares
STEPS = 20  # of conjugate gradients in each round

Calls = list[tuple[torch.Size, Tensor]]  # of a module: shape of the output, and the output (n, O) at `_positions`


@torch.no_grad()
def reconstruct(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> None:
    """Fit each cheap convolution of a student to the output of the standard convolution that it replaces, in place.

    The convolutions follow in the order of the forward pass. The least-squares targets are the teacher's outputs for
    the same images, the inputs are those of the student so far, so that a convolution makes up for the errors of those
    before it (as in He et al., *Channel Pruning*, ICCV 2017, section 3.2). Where the student has its stride elsewhere,
    the target is the output of the standard convolution for the student's input. The fit alternates between both
    stages of the convolution. In the end, the statistics of BatchNorm are computed again.

    Args:
        student: one that `model.convert.inherit` started from the teacher.
        batches: training images, (B, C, H, W) each, on the device of both networks.

    Raises:
        UserError (a ValueError): the teacher has no standard convolution for a cheap one.
    """
    pairs = {conv: cheap for cheap, conv in replaced(student, teacher).values()}
    if not pairs:
        return
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    modes, momenta = (student.training, teacher.training), [norm.momentum for norm in norms]
    student.eval()
    teacher.eval()
    for norm in norms:
        norm.train().momentum = None  # a mean over all batches
    for conv, targets in _outputs(teacher, list(pairs), batches).items():
        _fit(pairs[conv], *_samples(student, pairs[conv], conv, targets, batches))
    for norm in norms:
        norm.reset_running_stats()
    for images in batches:
        student(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    student.train(modes[0])
    teacher.train(modes[1])


class _Seen(Exception):
    """Ends a forward pass whose later layers are not needed."""


def _positions(y: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `count` random (image, row, column) of a feature map (B, C, H, W), the same for each map of this size."""
    size = y.shape[0], *y.shape[2:]
    chosen = torch.randperm(size[0] * size[1] * size[2], generator=torch.Generator().manual_seed(0))[:count]
    return torch.unravel_index(chosen.to(y.device), size)


def _outputs(teacher: nn.Module, convs: Sequence[nn.Module], batches: Sequence[Tensor]) -> dict[nn.Module, Calls]:
    """The calls of each convolution for these batches, in the order of the forward pass."""
    found = {}

    def keep(conv: nn.Module, _: tuple[Tensor], y: Tensor) -> None:
        image, row, column = _positions(y, POSITIONS // len(batches))
        found.setdefault(conv, []).append((y.shape, y[image, :, row, column]))

    with ExitStack() as hooks:
        for conv in convs:
            hooks.enter_context(conv.register_forward_hook(keep))
        for images in batches:
            teacher(images)
    return found


def _samples(
    student: nn.Module, cheap: CheapConv2d, conv: nn.Conv2d, targets: Calls, batches: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Patches that the cheap convolution sees, (n, I k k), and the outputs (n, O) that it should have there."""
    patches, outputs, left = [], [], list(targets)
    calls = len(targets) // len(batches)

    def take(_: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        shape, target = left.pop(0)
        found = _patches(cheap, inputs[0], _positions(y, POSITIONS // len(batches)))
        patches.append(found)
        outputs.append(target if y.shape == shape else F.linear(found, conv.weight.flatten(1), conv.bias))
        if len(left) % calls == 0:
            raise _Seen

    for images in batches:
        with suppress(_Seen), cheap.register_forward_hook(take):
            student(images)
    return torch.cat(patches), torch.cat(outputs)


def _patches(cheap: CheapConv2d, x: Tensor, positions: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The patches of its input x that the cheap convolution sees for these positions of its output: (n, I k k)."""
    spatial, (image, row, column) = cheap.spatial, positions
    if cheap.pads_same:
        x = pad_same(x, cheap.kernel_size, cheap.stride, cheap.dilation)
    pad = spatial.pad if isinstance(spatial, Shift2d) else spatial._reversed_padding_repeated_twice
    x = F.pad(x, pad, "constant" if spatial.padding_mode == "zeros" else spatial.padding_mode)
    for axis, size, stride, dilation in zip((2, 3), cheap.kernel_size, cheap.stride, cheap.dilation, strict=True):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x[image, :, row, column].flatten(1)


def _fit(cheap: CheapConv2d, patches: Tensor, outputs: Tensor) -> None:
    """The weights with which the cheap convolution maps `patches` to `outputs` with the least squared error.

    With the filters S (G, n, n k k) of G groups of n channels, the pointwise weight P (O, G n), the patches X and the
    outputs Y, it minimizes |Y - X (P S)'|^2, in terms of X'X and Y'X: P by a linear system, then S by conjugate
    gradients, in turn. A shift has no filters to fit. With a bias, X and Y are centered first.
    """
    pointwise, spatial = cheap.pointwise, cheap.spatial
    mean_x, mean_y = patches.mean(0), outputs.mean(0)
    if pointwise.bias is not None:
        patches, outputs = patches - mean_x, outputs - mean_y
    learns = not isinstance(spatial, Shift2d)
    groups, n = spatial.groups, cheap.in_channels // spatial.groups
    s = spatial.weight.cpu().double().reshape(groups, n, -1)  # MPS has no float64
    xx = (patches.T @ patches).cpu().double().reshape(groups, s.shape[2], groups, s.shape[2])
    yx = (outputs.T @ patches).cpu().double().reshape(-1, groups, s.shape[2])

    def mixing(s: Tensor) -> Tensor:
        gram = torch.einsum("hnq,hqgr,gmr->hngm", s, xx, s).reshape(groups * n, groups * n)
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
        return torch.linalg.solve(gram, torch.einsum("ogq,gnq->gno", yx, s).reshape(groups * n, -1)).T

    p = mixing(s)
    for _ in range(ROUNDS if learns else 0):
        pp = (p.T @ p).reshape(groups, n, groups, n)

        def normal(s: Tensor, pp: Tensor = pp) -> Tensor:
            return torch.einsum("gmhn,hngr->gmr", pp, torch.einsum("hnq,hqgr->hngr", s, xx))

        residual = torch.einsum("ogn,ogq->gnq", p.reshape(-1, groups, n), yx) - normal(s)
        s = s + _conjugate_gradients(normal, residual)
        p = mixing(s)
    if learns:
        scale = (p.norm(dim=0) / s.flatten(0, 1).norm(dim=1).clamp_min(1e-12)).sqrt().clamp_min(1e-12)
        p, s = p / scale, s * scale.reshape(groups, n, 1)  # both stages of one size, as `approximate` makes them
        spatial.weight.copy_(s.reshape(spatial.weight.shape))
    pointwise.weight.copy_(p[..., None, None])
    if pointwise.bias is not None:
        dense = torch.einsum("ogn,gnq->ogq", p.reshape(-1, groups, n), s).flatten(1)
        pointwise.bias.copy_(mean_y.cpu() - dense @ mean_x.cpu().double())


def _conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """An approximate solution x of normal(x) = right, for a positive semidefinite linear map."""
    x, residual, direction, size = torch.zeros_like(right), right, right, right.square().sum()
    for _ in range(STEPS):
        image = normal(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:
            break
        x = x + size / curvature * direction
        residual = residual - size / curvature * image
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return x
