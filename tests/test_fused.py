"""The compiled kernels compute what PyTorch's operators compute."""

import copy
import ctypes
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from model import fused
from model.conv import KINDS, CheapConv2d, standard_conv
from model.online import OnlineTeacher
from tests.helpers import channels_last, distance, random_norm
from utils.losses import online_distillation

pytestmark = pytest.mark.usefixtures("kernels")


def check_unit(conv, norm, x, residual, dtype=torch.float32, tolerance=1e-5):
    """Outputs, running statistics and all gradients of relu(norm(conv(x))) + residual, against float64."""
    modules = copy.deepcopy(nn.ModuleList([conv, norm])).train()
    reference = copy.deepcopy(modules).double()
    inputs = [x, residual] if residual is not None else [x]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    plain = [tensor.detach().double().requires_grad_() for tensor in inputs]

    out = fused.conv_norm_relu(*modules, *inputs)
    assert out.dtype == dtype
    assert "NormReLU" in type(out.grad_fn).__name__, "the kernels did not compute it"
    expected = F.relu(reference[1](reference[0](plain[0])))
    expected = expected + plain[1] if residual is not None else expected
    grad = channels_last(*out.shape, seed=9)
    out.backward(grad.to(dtype))
    expected.backward(grad.double())

    pairs = {"output": (out, expected)}
    pairs |= {f"gradient of input {i}": (a.grad, b.grad) for i, (a, b) in enumerate(zip(inputs, plain, strict=True))}
    named = zip(modules.named_parameters(), reference.parameters(), strict=True)
    pairs |= {f"gradient of {name}": (a.grad, b.grad) for (name, a), b in named}
    pairs |= {name: (a, b) for (name, a), b in zip(modules.named_buffers(), reference.buffers(), strict=True)}
    for name, (value, wanted) in pairs.items():
        assert distance(value, wanted) < tolerance, f"{name}: {distance(value, wanted):.2g}"


@pytest.mark.parametrize("kind", ["depthwise", "shift"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "height", "width", "batch"),
    [
        (16, 16, 1, 7, 5, 3),
        (128, 128, 1, 4, 5, 2),
        (16, 32, 2, 8, 8, 2),
        (32, 48, 2, 7, 9, 3),
        (64, 64, 1, 1, 3, 5),
        (48, 16, 3, 10, 7, 2),
    ],
)
def test_a_cheap_convolution_with_norm_and_relu(
    kind, with_residual, in_channels, out_channels, stride, height, width, batch
):
    torch.manual_seed(0)
    conv = CheapConv2d(in_channels, out_channels, 3, stride, kind)
    x = channels_last(batch, in_channels, height, width, seed=1)
    size = (batch, out_channels, -(-height // stride), -(-width // stride))
    check_unit(conv, random_norm(out_channels), x, channels_last(*size, seed=2) if with_residual else None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_with_several_uses_gets_the_sum_of_their_gradients(kind):
    torch.manual_seed(0)
    conv, norm = CheapConv2d(16, 16, kind=kind), random_norm(16)
    x = channels_last(2, 16, 5, 6).requires_grad_()
    first, second = channels_last(2, 16, 5, 6, seed=1), channels_last(2, 16, 5, 6, seed=2)
    plain = F.relu(norm(conv(x)))
    expected = torch.autograd.grad([plain, x], x, [first, second])[0]
    out, again = fused.conv_norm_relu_and_input(conv, norm, x)
    assert torch.equal(again, x)
    assert distance(torch.autograd.grad([out, again], x, [first, second], retain_graph=True)[0], expected) < 1e-5
    assert torch.equal(torch.autograd.grad(again, x, second)[0], second)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("conv", [nn.Identity(), standard_conv(32, 32), CheapConv2d(32, 32, kind="group")])
def test_norm_and_relu_after_another_convolution(conv, with_residual):
    x, residual = channels_last(3, 32, 9, 7, seed=1), channels_last(3, 32, 9, 7, seed=2)
    check_unit(conv, random_norm(32), x, residual if with_residual else None)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_group_convolution_computed_as_a_dense_one(stride):
    torch.manual_seed(0)
    conv = CheapConv2d(16, 32, 3, stride, "group", groups=4)
    x = channels_last(2, 16, 7, 8)
    assert torch.allclose(F.conv2d(x, conv.dense_weight(), stride=stride, padding=1), conv(x), rtol=1e-5, atol=1e-5)
    check_unit(conv, random_norm(32), x, None)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_exact_as_its_digits(kind):
    torch.manual_seed(0)
    x, residual = channels_last(4, 16, 8, 8), channels_last(4, 16, 8, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        check_unit(CheapConv2d(16, 16, kind=kind), random_norm(16), x, residual, torch.bfloat16, tolerance=0.02)


def test_statistics_of_a_batch_far_from_zero_keep_their_digits():
    """Sums of squares in float32 would lose all of them: here the mean is 1,000 standard deviations from zero."""
    x, norm = channels_last(64, 16, 32, 32, mean=1000.0), nn.BatchNorm2d(16, momentum=1.0)
    fused.norm_relu(norm, x)
    assert distance(norm.running_mean, x.double().mean((0, 2, 3))) < 1e-7
    assert distance(norm.running_var, x.double().var((0, 2, 3))) < 1e-6


@pytest.mark.parametrize("size", [(8, 16, 32, 32), (1, 16, 2, 20_000)])
@pytest.mark.parametrize("outlier", [1e2, 1e4])
def test_statistics_survive_an_outlier_in_the_first_pixel(size, outlier):
    """Distances to it, summed in float32, had lost three digits of the variance."""
    x, conv = channels_last(*size), CheapConv2d(16, 16)
    x[0, :, 0, 0] = outlier
    nn.init.dirac_(conv.spatial.weight, groups=16)
    nn.init.dirac_(conv.pointwise.weight)
    for compute in (fused.norm_relu, partial(fused.conv_norm_relu, conv)):
        norm = nn.BatchNorm2d(16, momentum=1.0)
        compute(norm, x)
        assert distance(norm.running_mean, x.double().mean((0, 2, 3))) < 1e-6
        assert distance(norm.running_var, x.double().var((0, 2, 3))) < 2e-6


def test_a_block_of_pixels_ends_in_the_middle_of_an_image():
    """More pixels than are summed in float32 at a time, and not a multiple of their number."""
    torch.manual_seed(0)
    check_unit(CheapConv2d(16, 16), random_norm(16), channels_last(3, 16, 37, 41), None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel_size", [1, 5])
def test_other_kernel_sizes(kind, kernel_size):
    torch.manual_seed(0)
    check_unit(CheapConv2d(16, 16, kernel_size, kind=kind), random_norm(16), channels_last(2, 16, 7, 6), None)


def test_a_student_that_is_evaluated_first_can_be_trained():
    model.shift.shift_filters.cache_clear()
    conv, norm, x = CheapConv2d(48, 16, kind="shift"), nn.BatchNorm2d(16), channels_last(2, 48, 4, 4)
    with torch.inference_mode():
        fused.conv_norm_relu(conv.eval(), norm.eval(), x)
    fused.conv_norm_relu(conv.train(), norm.train(), x).sum().backward()
    assert conv.pointwise.weight.grad is not None


def test_a_single_pixel_cannot_be_normalized():
    norm = nn.BatchNorm2d(16)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused.norm_relu(norm, channels_last(1, 16, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # a stride leaves one of four
        fused.conv_norm_relu(CheapConv2d(16, 16, stride=2), norm, channels_last(1, 16, 2, 2))
    assert not norm.running_var.isnan().any()


def test_not_a_number_comes_through():
    """A run that has diverged must be seen to."""
    x = channels_last(2, 16, 4, 4)
    x[0, 3, 1, 1] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert fused.conv_norm_relu(CheapConv2d(16, 16), nn.BatchNorm2d(16), x.to(dtype)).isnan().any()


@pytest.mark.parametrize("conv", KINDS)
def test_losses_and_gradients_of_a_whole_learner(conv):
    """A step of two students with their online teacher is as close to float64 as PyTorch's own float32 is."""
    torch.manual_seed(0)
    learner = OnlineTeacher([model.build("resnet_20_sparse", 4, conv=conv) for _ in range(2)], 4)
    learner = learner.to(memory_format=torch.channels_last)
    for module in learner.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 3.0)  # few values near a kink, which rounding decides
    x, targets = channels_last(8, 3, 16, 16), torch.arange(8) % 4

    def step(dtype):
        network = copy.deepcopy(learner).to(dtype)
        losses = online_distillation(*network(x.to(dtype)), targets, lam=0.5)
        losses["loss"].backward()
        gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
        return losses | gradients | dict(network.named_buffers())

    fast = step(torch.float32)
    fused.disable()
    plain, exact = step(torch.float32), step(torch.float64)
    for name, wanted in exact.items():
        assert distance(fast[name], wanted) < max(1e-5, 10 * distance(plain[name], wanted)), name
    gradients = [torch.cat([v.flatten() for k, v in s.items() if "gradient" in k]) for s in (fast, exact)]
    assert distance(*gradients) < 1e-5


def test_every_number_of_threads_gives_the_same_within_rounding_and_one_number_the_same_bits():
    torch.manual_seed(0)
    conv, norm = CheapConv2d(16, 16), random_norm(16)
    x = channels_last(7, 16, 12, 12).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            fused.conv_norm_relu(conv, norm, x).square().sum().backward()
            results.append(torch.cat([t.grad.flatten() for t in (x, conv.spatial.weight, conv.pointwise.weight)]))
            x.grad = conv.spatial.weight.grad = conv.pointwise.weight.grad = None
    finally:
        torch.set_num_threads(threads)
    assert all(distance(result, results[0]) < 1e-5 for result in results)
    assert torch.equal(results[2], results[3])


def test_results_do_not_depend_on_how_many_of_its_threads_a_region_is_given():
    torch.manual_seed(0)
    conv, norm = CheapConv2d(16, 16), random_norm(16)
    x, grad = channels_last(7, 16, 24, 24).requires_grad_(), channels_last(7, 16, 24, 24)
    openmp = ctypes.CDLL(None)
    levels, threads = openmp.omp_get_max_active_levels(), torch.get_num_threads()
    results = []
    try:
        torch.set_num_threads(3)
        for allowed in (levels, 0):  # without a level of parallel regions, each is given one thread
            openmp.omp_set_max_active_levels(allowed)
            for compute in (partial(fused.conv_norm_relu, conv, norm), partial(fused.norm_relu, norm)):
                out = compute(x)
                grads = torch.autograd.grad(out, (x, *norm.parameters(), *conv.parameters()), grad, allow_unused=True)
                results.append(torch.cat([t.flatten() for t in (out, *grads) if t is not None]))
    finally:
        openmp.omp_set_max_active_levels(levels)
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
