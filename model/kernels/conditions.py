"""Whether the kernels compute exactly what PyTorch's operators do with given modules and tensors.

PyTorch computes or refuses everything else. These checks run before every call, and at batch 1 they take a
third of its time.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from model.conv import CheapConv2d
from model.kernels import library
from model.shift import Shift2d, shift_filters

LANES = 16  # channels come in multiples of it
# With more channels, the matrix products of PyTorch's operators are faster; measured in experiment/PERFORMANCE.md.
MOST_CHANNELS = {torch.float32: 128, torch.bfloat16: 64}
_TENSORS = (Tensor, nn.Parameter)  # the data of subclasses need not be at data_ptr


def is_computable(x: Tensor) -> bool:
    """Whether there are kernels for feature maps like x, and autograd alone follows how they are computed.

    Exported, traced and compiled graphs, function transforms, dispatch modes and hooks on all modules see PyTorch's
    operators.
    """
    return (
        library.current is not None
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and not is_in_torch_dispatch_mode()
        and forward_ad._current_level < 0
        and not _has_any_global_hook()
        and type(x) in _TENSORS
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in MOST_CHANNELS
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def separable(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Filters, pointwise weight and stride of a plain cheap convolution; None if it is, or does, anything else.

    Args:
        x: its input, which `is_computable`.
    """
    if not is_itself(conv, CheapConv2d):
        return None
    spatial, pointwise = conv._modules["spatial"], conv._modules["pointwise"]
    if not (is_itself(spatial, nn.Conv2d, Shift2d) and is_itself(pointwise, nn.Conv2d) and conv.is_plain):
        return None
    if x.dtype is not (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32):
        return None
    channels, mixing = x.shape[1], pointwise._parameters.get("weight")
    if not _fits(mixing, torch.float32, (pointwise.out_channels, channels, 1, 1)):
        return None
    if type(spatial) is Shift2d:
        return (shift_filters(channels), mixing, pointwise.stride[0]) if spatial.channels == channels else None
    filters = spatial._parameters.get("weight")
    if not _fits(filters, torch.float32, (channels, spatial.in_channels // spatial.groups, 3, 3)):
        return None
    return filters, mixing, pointwise.stride[0]


def applies(norm: nn.BatchNorm2d, x: Tensor, size: tuple[int, ...], residual: Tensor | None) -> bool:
    """Whether the kernels compute `norm` and what follows it.

    Args:
        x: input, which `is_computable`, of the norm or of a convolution before it that is `separable`.
        size: (B, C, H, W) of the norm's input.
    """
    batch, channels, height, width = size
    if channels % LANES or x.shape[1] % LANES or not is_itself(norm, nn.BatchNorm2d):
        return False
    if norm.momentum is None or not norm.track_running_stats or norm._buffers.get("num_batches_tracked") is None:
        return False
    # One pixel has no variance. Gradients through running statistics are PyTorch's.
    if batch * height * width == 1 if norm.training else torch.is_grad_enabled():
        return False
    if residual is not None and not _fits(residual, x.dtype, size):
        return False
    return all(_fits(tensor, torch.float32, (channels,)) and tensor.is_contiguous() for tensor in vectors(norm))


def is_itself(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling a module runs the forward of its class, one of `kinds`, and nothing else.

    Pruning (torch.nn.utils.prune) adds hooks, a parametrization changes the class.
    """
    return type(module) in kinds and not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def vectors(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """Its weight, bias, running mean and running variance."""
    weights, running = norm._parameters, norm._buffers  # nn.Module.__getattr__ is slower
    return weights.get("weight"), weights.get("bias"), running.get("running_mean"), running.get("running_var")


def _fits(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return (
        type(tensor) in _TENSORS
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and tensor.layout is torch.strided
    )
