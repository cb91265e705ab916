"""Convolution, BatchNorm and ReLU in as few goes over memory as possible.

`norm_relu` and `conv_norm_relu` say what is to be computed. PyTorch's own operators compute it, until `enable` has
compiled the kernels of kernels/ for this machine's CPU; from then on these do, wherever they can. The results are the
same but for rounding, and nothing else changes: modules, weights and checkpoints know nothing of it.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from model.conv import CheapConv2d, Shift2d
from utils.errors import UserError
from utils.files import atomic_write

_SOURCES = Path(__file__).with_name("kernels")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"]
_LANES = 16  # channels come in multiples of it
# With more channels, the matrix products of PyTorch's operators are faster; measured in experiment/PERFORMANCE.md.
_MOST_CHANNELS = {torch.float32: 128, torch.bfloat16: 64}
_TENSORS = (Tensor, nn.Parameter)  # subclasses need not have their data where data_ptr points
_library: ctypes.CDLL | None = None


class KernelsUnavailable(Exception):
    """The kernels cannot be compiled or loaded on this machine; the message says why."""


def enable() -> None:
    """Use the compiled kernels from now on. The first time on a machine this takes a few seconds.

    Raises:
        KernelsUnavailable: no compiler, or one that cannot build them.
    """
    global _library
    _library = _load()


def check() -> None:
    """Compile or load the kernels without using them yet; raises as `enable` does."""
    _load()


def disable() -> None:
    """Use PyTorch's own operators from now on."""
    global _library
    _library = None


def kernels_hash() -> str | None:
    """Of the kernels in use: their sources, compiler and processor. None: PyTorch's operators are."""
    return Path(_library._name).stem.removeprefix("kernels-") if _library else None


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`relu(norm(x))`, plus `residual` if there is one. (B, C, H, W) -> (B, C, H, W)."""
    if _is_computable(x) and _applies(norm, x, x.shape, residual):
        residual = _in_channels_last(residual)
        if not norm.training:
            return _infer_norm_relu(norm, x, residual)
        norm.num_batches_tracked.add_(1)
        return _NormReLU.apply(x, norm.weight, norm.bias, norm, residual)
    out = F.relu(norm(x))
    return out if residual is None else out + residual


def conv_norm_relu(conv: nn.Module, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`relu(norm(conv(x)))`, plus `residual` if there is one. (B, C, H, W) -> (B, O, H', W')."""
    return conv_norm_relu_and_input(conv, norm, x, residual)[0]


def conv_norm_relu_and_input(
    conv: nn.Module, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`conv_norm_relu`, and x again, for what else is made of it: its gradients then are summed as they are written."""
    if _is_computable(x) and (stages := _separable(conv, x)):
        filters, mixing, stride = stages
        group, (batch, channels, height, width), out_channels = filters.shape[1], x.shape, mixing.shape[0]
        size = batch, out_channels, -(-height // stride), -(-width // stride)
        if max(channels, out_channels) <= _MOST_CHANNELS[x.dtype] and _applies(norm, x, size, residual):
            residual = _in_channels_last(residual)
            if not norm.training and (_LANES % group == 0 or group % _LANES == 0):
                return _infer_cheap_conv(x, filters, mixing, stride, norm, residual), x
            if norm.training and group == 1:
                norm.num_batches_tracked.add_(1)
                weights = filters.contiguous(), mixing.contiguous(), norm.weight, norm.bias
                return _CheapConvNormReLU.apply(x, *weights, stride, norm, residual)
        if group > 1 and channels <= _dense_up_to(x.dtype):
            return norm_relu(norm, F.conv2d(x, conv.dense_weight(), stride=stride, padding=1), residual), x
    return norm_relu(norm, conv(x), residual), x


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs whatever stands before a BatchNorm and a ReLU through `conv_norm_relu` with them."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer, *layers = layers
            if len(layers) > 1 and type(layers[0]) is nn.BatchNorm2d and _is_itself(layers[1], nn.ReLU):
                norm, _, *layers = layers
                x = conv_norm_relu(layer, norm, x)
            else:
                x = layer(x)
        return x


def _applies(norm: nn.BatchNorm2d, x: Tensor, size: tuple[int, ...], residual: Tensor | None) -> bool:
    """Whether the kernels compute exactly what PyTorch's operators do with these modules and tensors.

    Everything that they were not made for is PyTorch's to compute or to refuse.

    Args:
        x: feature map that `_is_computable`: the norm takes it or, if it is of another size, what a convolution that
            is `_separable` makes of it.
        size: of what the norm takes, (B, C, H, W).
    """
    batch, channels, height, width = size
    if channels % _LANES or x.shape[1] % _LANES or not _is_itself(norm, nn.BatchNorm2d):
        return False
    if norm.momentum is None or not norm.track_running_stats or norm._buffers.get("num_batches_tracked") is None:
        return False
    # Of one pixel there is no variance. Gradients through running statistics are PyTorch's.
    if batch * height * width == 1 if norm.training else torch.is_grad_enabled():
        return False
    if residual is not None and not _fits(residual, x.dtype, size):
        return False
    return all([_fits(t, torch.float32, (channels,)) and t.is_contiguous() for t in _vectors(norm)])


def _separable(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """The filters, pointwise weight and stride of a plain cheap convolution, if that is all that it does with x."""
    if not _is_itself(conv, CheapConv2d):
        return None
    spatial, pointwise = conv._modules["spatial"], conv._modules["pointwise"]
    if not (_is_itself(spatial, nn.Conv2d, Shift2d) and _is_itself(pointwise, nn.Conv2d) and conv.is_plain):
        return None
    channels, mixing = x.shape[1], pointwise._parameters.get("weight")
    if type(spatial) is Shift2d:
        filters, group = conv.spatial_filters(), 1
    else:
        filters, group = spatial._parameters.get("weight"), spatial.in_channels // spatial.groups
    fits = (
        x.dtype == (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        and _fits(filters, torch.float32, (channels, group, 3, 3))
        and _fits(mixing, torch.float32, (pointwise.out_channels, channels, 1, 1))
    )
    return (filters, mixing, pointwise.stride[0]) if fits else None


def _is_computable(x: Tensor) -> bool:
    """Whether there are kernels for feature maps like x, and autograd alone follows how they are computed.

    Exported, traced and compiled graphs, function transforms, dispatch modes and hooks on all modules see PyTorch's
    operators.
    """
    return (
        _library is not None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not is_in_torch_dispatch_mode()
        and forward_ad._current_level < 0
        and not _has_any_global_hook()
        and type(x) in _TENSORS
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in _MOST_CHANNELS
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _is_itself(module: nn.Module, *kinds: type[nn.Module]) -> bool:
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


def _fits(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return (
        type(tensor) in _TENSORS
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.dtype is dtype
        and tensor.shape == shape
    )


@functools.cache
def _dense_up_to(dtype: torch.dtype) -> int:
    """The channels up to which a dense convolution is faster than a group convolution and its pointwise stage.

    It does several times the multiplications, but in matrices that a CPU is made for, and with one feature map less
    to write and read. Measured in experiment/PERFORMANCE.md.
    """
    return 32 if dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False) else 16


def _in_channels_last(residual: Tensor | None) -> Tensor | None:
    return None if residual is None else residual.contiguous(memory_format=torch.channels_last)


def _infer_norm_relu(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> Tensor:
    y, channels = torch.empty_like(x), x.shape[1]
    tensors = *_pointers(x, residual), *_pointers(*_vectors(norm)), norm.eps, y.data_ptr()
    _library.norm_relu_infer(*tensors, x.numel() // channels, channels, *_run(x))
    return y


def _infer_cheap_conv(
    x: Tensor, filters: Tensor, mixing: Tensor, stride: int, norm: nn.BatchNorm2d, residual: Tensor | None
) -> Tensor:
    mixing = mixing.contiguous()
    if not filters.is_contiguous(memory_format=torch.channels_last):
        filters = filters.contiguous()
    (batch, channels, height, width), out_channels = x.shape, mixing.shape[0]
    size = batch, out_channels, -(-height // stride), -(-width // stride)
    z = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    tensors = *_pointers(x, filters, mixing, residual), *_pointers(*_vectors(norm)), norm.eps, z.data_ptr()
    shape = batch, height, width, channels, out_channels, stride
    _library.cheap_conv_infer(*tensors, *shape, filters.shape[1], filters.stride(3), *_run(x))
    return z


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None) -> Tensor:
        y, coefficients = torch.empty_like(x), torch.empty(6, x.shape[1])
        ctx.save_for_backward(x, coefficients)
        size = x.numel() // x.shape[1], x.shape[1]
        tensors = (*_pointers(x, residual), _Norm.of(norm), *_pointers(y, coefficients))
        _library.norm_relu_forward(*tensors, *size, *_run(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), *torch.empty(2, x.shape[1])
        size = x.numel() // x.shape[1], x.shape[1]
        tensors = _pointers(grad, x, coefficients, grad_x, grad_weight, grad_bias)
        _library.norm_relu_backward(*tensors, *size, *_run(x))
        return grad_x, grad_weight, grad_bias, None, grad if ctx.needs_input_grad[4] else None


class _CheapConvNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, filters: Tensor, pointwise: Tensor, weight: Tensor, bias: Tensor, stride: int,
        norm: nn.BatchNorm2d, residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        batch, channels, height, width = x.shape
        ctx.shape = shape = _Shape(batch, height, width, channels, len(pointwise), stride)
        size = batch, len(pointwise), -(-height // stride), -(-width // stride)
        z = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        y, coefficients = torch.empty_like(z), torch.empty(6, len(pointwise))
        ctx.save_for_backward(x, filters, pointwise, y, coefficients)
        inputs, outputs = _pointers(x, filters, pointwise, residual), _pointers(y, z, coefficients)
        _library.cheap_conv_forward(*inputs, _Norm.of(norm), *outputs, shape, *_run(x))
        return z, x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_skip: Tensor | None) -> tuple[Tensor | None, ...]:
        x, filters, pointwise, y, coefficients = ctx.saved_tensors
        if grad is None:
            return grad_skip, *[None] * 7
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_skip = None if grad_skip is None else grad_skip.contiguous(memory_format=torch.channels_last)
        grad_x, grad_pointwise = torch.empty_like(x), torch.zeros_like(pointwise)
        grad_filters = torch.zeros_like(filters) if ctx.needs_input_grad[1] else None
        grad_weight, grad_bias = torch.empty(2, len(pointwise))
        tensors = grad, grad_skip, x, filters, pointwise, y, coefficients, grad_x, grad_filters, grad_pointwise
        _library.cheap_conv_backward(*_pointers(*tensors, grad_weight, grad_bias), ctx.shape, *_run(x))
        grad_residual = grad if ctx.needs_input_grad[7] else None
        return grad_x, grad_filters, grad_pointwise, grad_weight, grad_bias, None, None, grad_residual


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("batch", "height", "width", "in_channels", "out_channels", "stride")]


class _Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias", "running_mean", "running_var")]
    _fields_ += [(name, ctypes.c_double) for name in ("eps", "momentum")]

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "_Norm":
        return cls(*_pointers(*_vectors(norm)), norm.eps, norm.momentum)


def _vectors(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """Its weight, bias, running mean and running variance."""
    weights, running = norm._parameters, norm._buffers  # nn.Module finds its own attributes more slowly
    return weights.get("weight"), weights.get("bias"), running.get("running_mean"), running.get("running_var")


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _run(x: Tensor) -> tuple[bool, int]:
    """The last arguments of every kernel: whether feature maps are bfloat16, and the threads to use."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


@functools.cache
def _load() -> ctypes.CDLL:
    try:
        library = _open()
    except OSError as error:
        raise KernelsUnavailable(str(error)) from error
    pointer, integer, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    real, run = ctypes.c_double, [integer] * 2
    statistics = [pointer] * 4 + [real]
    library.norm_relu_forward.argtypes = [pointer] * 2 + [_Norm] + [pointer] * 2 + [count, integer] + run
    library.norm_relu_backward.argtypes = [pointer] * 6 + [count, integer] + run
    library.norm_relu_infer.argtypes = [pointer] * 2 + statistics + [pointer, count, integer] + run
    library.cheap_conv_forward.argtypes = [pointer] * 4 + [_Norm] + [pointer] * 3 + [_Shape] + run
    library.cheap_conv_backward.argtypes = [pointer] * 12 + [_Shape] + run
    library.cheap_conv_infer.argtypes = [pointer] * 4 + statistics + [pointer] + [integer] * 8 + run
    return library


def _open() -> ctypes.CDLL:
    """The shared library, out of the user's cache, which has one for each source, compiler and kind of processor."""
    value = os.environ.get("CXX") or ""
    try:
        command = shlex.split(value)
    except ValueError as error:  # quotes that do not end
        raise KernelsUnavailable(f"CXX={value} cannot be split into words: {error}") from error
    command = command or [shutil.which("g++") or shutil.which("c++")]
    if command == [None]:
        raise KernelsUnavailable("there is no C++ compiler (g++)")
    name = f"kernels-{_key(command)}.so"
    try:
        library = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "od-cheap-convolution", name)
        if not _is_whole(library):
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(library) as file:
                file.write(_compile(command))
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, UserError):  # it cannot be written or executed there; no home directory
        with tempfile.TemporaryDirectory() as folder:  # what is loaded stays when its file is deleted
            library = Path(folder, name)
            library.write_bytes(_compile(command))
            return ctypes.CDLL(str(library))


def _key(command: list[str]) -> str:
    """A hash of the sources, flags, and what the compiler says of itself and of the processor that is `native`."""
    sources = b"".join(path.read_bytes() for path in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]))
    macros = _run_compiler(command, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    return hashlib.sha256(sources + repr((_FLAGS, command[1:])).encode() + macros).hexdigest()[:16]


def _compile(command: list[str]) -> bytes:
    """The shared library; its SHA-256 stands at the end, where the loader does not look."""
    with tempfile.TemporaryDirectory() as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        _run_compiler(command, *_FLAGS, "-c", _SOURCES / "kernels.cpp", "-o", compiled)
        # Linked without -fopenmp, for a second OpenMP runtime would fight with PyTorch's for the cores: what is left
        # undefined is found in the one that PyTorch has loaded.
        _run_compiler(command, "-shared", compiled, "-o", linked)
        content = linked.read_bytes()
    return content + hashlib.sha256(content).digest()


def _is_whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _run_compiler(command: list[str], *arguments: str | Path) -> bytes:
    """What the compiler prints.

    Raises:
        KernelsUnavailable: it fails, with its first line that says error.
    """
    english = os.environ | {"LC_ALL": "C"}
    try:
        return subprocess.run([*command, *arguments], capture_output=True, check=True, env=english).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [str(error)]
        line = next((line for line in lines if "error:" in line.lower()), lines[0])
        raise KernelsUnavailable(f"{shlex.join(command)} failed: {line}") from error
