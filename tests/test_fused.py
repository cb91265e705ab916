"""The compiled kernels compute what PyTorch's operators compute."""

import copy
import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import model
from model import fused
from model.conv import KINDS, CheapConv2d, standard_conv
from model.fused import FusedSequential
from model.kernels import library as compiled
from model.online import OnlineTeacher
from tests.helpers import BUDGET
from utils.losses import online_distillation

# Without a compiler there is nothing to test; whoever runs the tests must have one.
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def kernels():
    fused.enable()
    yield
    fused.disable()


def channels_last(*size, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) + mean).contiguous(memory_format=torch.channels_last)


def random_norm(channels, seed=0):
    norm = nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.copy_(torch.randn(channels, generator=generator))
    norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm


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


def distance(value, wanted):
    """Relative, over the whole tensor: a single value near a ReLU's kink may fall on its other side by rounding."""
    return ((value.double() - wanted).norm() / wanted.double().norm().clamp_min(1e-9)).item()


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


@pytest.fixture
def inferred(monkeypatch):
    """The names of the kernels of inference that were called."""
    names = []
    for name in ("cheap_conv_infer", "norm_relu_infer"):
        run = getattr(compiled.current, name)
        monkeypatch.setattr(compiled.current, name, lambda *a, run=run, name=name: names.append(name) or run(*a))
    return names


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("kind", "in_channels", "out_channels", "groups"),
    [
        ("depthwise", 16, 32, None),
        ("shift", 48, 16, None),
        ("group", 16, 16, 8),
        ("group", 16, 32, 4),
        ("group", 32, 32, 4),
        ("group", 64, 64, 4),
        ("group", 64, 48, 2),
        ("group", 16, 16, 1),
    ],
)
@pytest.mark.parametrize(
    ("batch", "height", "width", "stride"), [(3, 7, 15, 1), (2, 9, 13, 2), (2, 10, 7, 3), (1, 1, 1, 1), (1, 33, 40, 1)]
)
def test_inference_of_a_cheap_convolution(
    inferred, kind, in_channels, out_channels, groups, batch, height, width, stride, with_residual, dtype, tolerance
):
    torch.manual_seed(0)
    conv, norm = CheapConv2d(in_channels, out_channels, 3, stride, kind, groups=groups or 1), random_norm(out_channels)
    modules = nn.ModuleList([conv, norm]).eval()
    if with_residual:  # of weights in both layouts
        modules.to(memory_format=torch.channels_last)
    before = copy.deepcopy(modules.state_dict())
    x = channels_last(batch, in_channels, height, width, seed=1)
    size = batch, out_channels, -(-height // stride), -(-width // stride)
    residual = channels_last(*size, seed=2) if with_residual else None
    check_inference(conv, norm, x, residual, dtype, tolerance)
    assert inferred == ["cheap_conv_infer"]
    assert all(torch.equal(value, before[name]) for name, value in modules.state_dict().items())


def check_inference(conv, norm, x, residual, dtype=torch.float32, tolerance=1e-5):
    maps = [t if t is None else t.to(dtype) for t in (x, residual)]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = fused.conv_norm_relu(conv, norm, *maps)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        conv, norm = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
        expected = F.relu(norm(conv(x.double())))
        expected = expected if residual is None else expected + residual
    assert distance(out, expected) < tolerance


@pytest.mark.parametrize("conv", [nn.Identity(), standard_conv(32, 32), CheapConv2d(32, 32, kind="group", groups=16)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_inference_of_norm_and_relu(inferred, conv, with_residual):
    x, residual = channels_last(3, 32, 9, 7, seed=1), channels_last(3, 32, 9, 7, seed=2)
    check_inference(conv.eval(), random_norm(32).eval(), x, residual if with_residual else None)
    assert inferred == ["cheap_conv_infer" if isinstance(conv, CheapConv2d) else "norm_relu_infer"]


@pytest.mark.parametrize("kind", KINDS)
def test_inference_sees_weights_that_have_changed(inferred, kind):
    torch.manual_seed(0)
    network = model.build("resnet_20_sparse", 4, conv=kind).to(memory_format=torch.channels_last)
    other = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, fused=True)
    x = channels_last(4, 3, 16, 16)

    def check():
        inferred.clear()
        exact = copy.deepcopy(network).double().eval()
        with torch.no_grad():
            assert distance(network.eval()(x), exact(x.double())) < 1e-4
        assert inferred.count("cheap_conv_infer") == 18

    check()
    network.train()(x).square().sum().backward()
    optimizer.step()  # of weights and of running statistics
    check()
    network.load_state_dict(other.state_dict())
    check()


@pytest.mark.parametrize("training", [True, False])
def test_gradients_in_eval_mode_and_batches_in_training_mode_go_other_ways(inferred, training):
    conv, norm, x = CheapConv2d(16, 16), random_norm(16).train(training), channels_last(2, 16, 4, 4)
    with torch.set_grad_enabled(not training):
        out = fused.conv_norm_relu(conv, norm, x)
        assert torch.allclose(out, F.relu(norm(conv(x))), rtol=1e-5, atol=1e-5)
    assert out.requires_grad == (not training)
    assert inferred == []


def test_inference_gives_the_same_bits_with_any_number_of_threads():
    torch.manual_seed(0)
    threads, x = torch.get_num_threads(), channels_last(3, 32, 30, 34)
    try:
        for kind in KINDS:
            conv, norm, results = CheapConv2d(32, 32, kind=kind), random_norm(32).eval(), []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                with torch.no_grad():
                    results.append(fused.conv_norm_relu(conv, norm, x))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 16, 4, 4),
        channels_last(2, 16, 4, 4).double(),
        channels_last(2, 12, 4, 4),
        channels_last(2, 16, 4, 4).to("meta"),
    ],
    ids=["NCHW", "float64", "12 channels", "another device"],
)
def test_what_the_kernels_cannot_take_goes_through_pytorch(x):
    channels = x.shape[1]
    conv, norm = (m.to(x.device, x.dtype) for m in (CheapConv2d(channels, channels), nn.BatchNorm2d(channels)))
    out = fused.conv_norm_relu(conv, norm, x)
    assert type(out.grad_fn).__name__ == "ReluBackward0"


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


def part_of(x, at):
    """x as a part of a larger tensor, which has NaN elsewhere."""
    whole = torch.full([2 * size for size in x.shape], torch.nan, dtype=x.dtype)
    whole = whole.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else whole
    part = whole[tuple(at(size) for size in x.shape)]
    return part.copy_(x)


def in_parameters(module, change):
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(change(parameter.detach())))


LAYOUTS = {
    "as it is": lambda x: x,
    "NCHW": lambda x: x.contiguous(),
    "first half": lambda x: part_of(x, lambda size: slice(size)),
    "every second": lambda x: part_of(x, lambda size: slice(None, None, 2)),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "meta": lambda x: x.to("meta"),
}
RESIDUALS = LAYOUTS | {
    "none": lambda x: None,
    "of each channel": lambda x: x[:1, :, :1, :1],
    "of each column": lambda x: x.sum((0, 1, 2)),
    "of one image": lambda x: x[:1].expand_as(x),
    "of other channels": lambda x: x.repeat(1, 2, 1, 1),
    "of other pixels": lambda x: F.pad(x, (0, 1, 0, 0)),
    "of more images": lambda x: x.repeat(2, 1, 1, 1),
}
TAMPERING = {
    "as it is": lambda m: None,
    "hook": lambda m: m.register_forward_hook(lambda module, args, out: 2 * out),
    "hook before": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "hook in backward": lambda m: m.register_full_backward_hook(lambda module, grads, _: (3 * grads[0],)),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()),
    "own forward": lambda m: setattr(m, "forward", lambda x: x.exp()),
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "strided": lambda m: in_parameters(m, LAYOUTS["every second"]),
}
NORMS = TAMPERING | {
    "not affine": lambda m: m.__init__(m.num_features, affine=False),
    "no running statistics": lambda m: m.__init__(m.num_features, track_running_stats=False),
    "ignored running statistics": lambda m: setattr(m, "track_running_stats", False),
    "average": lambda m: setattr(m, "momentum", None),
    "not counted": lambda m: setattr(m, "num_batches_tracked", None),
    "other channels": lambda m: m.__init__(m.num_features + 16),
    "statistics of float64": lambda m: setattr(m, "running_var", m.running_var.double()),
    "no bias": lambda m: setattr(m, "bias", None),
}
STAGES = TAMPERING | {
    "stride": lambda m: setattr(m, "stride", (3, 3)),
    "padding": lambda m: setattr(m, "padding", (2, 2)),
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(len(m.weight)))),
    "other channels": lambda m: m.__init__(m.in_channels + 16, m.out_channels, m.kernel_size, m.stride),
    "an Identity": lambda m: setattr(m, "__class__", nn.Identity),
}


def mostly(usual, others):
    return st.one_of(st.just(usual), st.just(usual), st.sampled_from(list(others)))


CASES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([None, *KINDS]),
        "channels": st.sampled_from([(16, 16), (32, 16), (12, 16), (16, 12), (64, 144)]),
        "stride": st.integers(1, 2),
        "size": st.tuples(mostly(2, range(4)), st.integers(1, 5), st.integers(1, 5)),
        "x": mostly("as it is", LAYOUTS),
        "residual": mostly("none", RESIDUALS),
        "norm": mostly("as it is", NORMS),
        "conv": mostly("as it is", TAMPERING.keys() - {"pruned", "parametrized"}),
        "spatial": mostly("as it is", STAGES),
        "pointwise": mostly("as it is", STAGES),
        "training": st.booleans(),
        "gradients": st.booleans(),
        "autocast": mostly(False, [True]),
    }
)


def computed(case):
    """Output, statistics and gradients of a case, or the type of the error that it ends in."""
    torch.manual_seed(0)
    (in_channels, out_channels), (batch, height, width), stride = case["channels"], case["size"], case["stride"]
    norm, conv = random_norm(out_channels), nn.Identity()
    if case["kind"]:
        conv = CheapConv2d(in_channels, out_channels, 3, stride, case["kind"])
        STAGES[case["pointwise"]](conv.pointwise)
        if case["kind"] != "shift":
            STAGES[case["spatial"]](conv.spatial)
        TAMPERING[case["conv"]](conv)
    else:
        in_channels, stride = out_channels, 1
    NORMS[case["norm"]](norm)
    modules = nn.ModuleList([conv, norm]).train(case["training"])
    x = LAYOUTS[case["x"]](channels_last(batch, in_channels, height, width)).detach().requires_grad_(case["gradients"])
    size = batch, out_channels, -(-height // stride), -(-width // stride)
    residual = RESIDUALS[case["residual"]](channels_last(*size, seed=1))
    try:
        with torch.set_grad_enabled(case["gradients"]), torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
            out = fused.conv_norm_relu(conv, norm, x, residual)
        if case["gradients"]:
            out.backward(torch.randn(out.shape, dtype=out.dtype, device=out.device))
    except (RuntimeError, ValueError, NotImplementedError, IndexError) as error:
        return type(error)
    gradients = {f"gradient of {name}": p.grad for name, p in [("x", x), *modules.named_parameters()]}
    return {"output": out} | dict(modules.named_buffers()) | gradients


@settings(
    max_examples=int(60 * BUDGET),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(CASES)
def test_whatever_comes_is_computed_or_refused_as_pytorch_does(case):
    check_against_pytorch(case)


USUAL = {
    "kind": "depthwise", "channels": (16, 16), "stride": 1, "size": (2, 3, 4), "x": "as it is", "residual": "as it is",
    "norm": "as it is", "conv": "as it is", "spatial": "as it is", "pointwise": "as it is", "gradients": True,
    "autocast": False,
}  # fmt: skip
KINDS_OF = {
    "x": LAYOUTS, "residual": RESIDUALS, "norm": NORMS, "conv": TAMPERING.keys() - {"pruned", "parametrized"},
    "spatial": STAGES, "pointwise": STAGES,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("part", "kind"), [(part, kind) for part, kinds in KINDS_OF.items() for kind in sorted(kinds)])
def test_each_odd_part_alone_is_computed_or_refused_as_pytorch_does(part, kind, training):
    """Without gradients, too, in evaluation, where they would leave the work to PyTorch."""
    check_against_pytorch(USUAL | {part: kind, "training": training, "gradients": training})


def check_against_pytorch(case):
    fused.enable()
    result = computed(case)
    fused.disable()
    expected = computed(case)
    if isinstance(expected, type):
        assert result is expected
        return
    assert result.keys() == expected.keys()
    rough = case["autocast"] or "bfloat16" in case.values()
    for name, wanted in expected.items():
        value = result[name]
        assert (value is None) == (wanted is None), name
        if wanted is None:
            continue
        assert (value.shape, value.dtype, value.device) == (wanted.shape, wanted.dtype, wanted.device), name
        # PyTorch's own gradients in bfloat16 are garbage for a depthwise filter with a stride and maps one pixel wide.
        if not wanted.is_meta and (name == "output" or not rough):
            error = (value.double() - wanted.double()).norm()
            assert torch.equal(value.isnan(), wanted.isnan()), name
            assert not error > (0.3 if rough else 1e-3) * (1 + wanted.double().norm()), name


def test_what_follows_pytorchs_operators_sees_them():
    conv, norm, x = CheapConv2d(16, 16), random_norm(16).eval(), channels_last(2, 16, 4, 4)
    network = FusedSequential(conv, norm, nn.ReLU()).eval().requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(network, x)
        torch.testing.assert_close(traced(x + 1), network(x + 1))
        with FlopCounterMode(display=False) as counter:
            network(x)
        assert counter.get_total_flops() == 2 * 2 * 16 * 16 * (9 + 16)
        torch.testing.assert_close(torch.func.vmap(network)(x[None])[0], network(x))
        tangents = [torch.func.jvp(network, (x,), (torch.ones_like(x),))[1]]
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(network(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    torch.testing.assert_close(*tangents)
    assert tangents[0].any()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_fused_relu_runs_its_hooks(enabled):
    if not enabled:
        fused.disable()
    network, seen = FusedSequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()), []
    hook = network[2].register_forward_hook(lambda module, args, out: seen.append(out))
    out = network(channels_last(2, 3, 4, 4))
    assert seen[0] is out
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(network(channels_last(2, 3, 4, 4)), out)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A cache of its own, and a compiler that has the library ready and notes how it is called."""
    fused.enable()
    (tmp_path / "kernels.so").write_bytes(Path(compiled.current._name).read_bytes()[:-32])
    script = tmp_path / "a compiler"
    script.write_text(
        f"""#!/bin/sh
echo "$*" >> '{tmp_path}/calls'
for last; do :; done
case "$*" in
    *-shared*) cp '{tmp_path}/kernels.so' "$last" ;;
    *" -c "*) touch "$last" ;;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{script}' -m64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.load.cache_clear()
    yield script
    compiled.load.cache_clear()


def links(compiler):
    return (compiler.parent / "calls").read_text().count("-shared")


@pytest.mark.parametrize("damage", ["nothing", "empty", "cut off", "flipped byte", "deleted"])
def test_a_damaged_library_is_compiled_again(compiler, damage):
    fused.enable()
    assert (compiler.parent / "calls").read_text().startswith("-m64 ")
    (library,) = (compiler.parent / "od-cheap-convolution").iterdir()
    content = library.read_bytes()
    library.unlink()  # it is mapped
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damaged = {"nothing": content, "empty": b"", "cut off": content[:5000], "flipped byte": flipped}
    if damage in damaged:
        library.write_bytes(damaged[damage])
    compiled.load.cache_clear()
    fused.enable()
    assert library.read_bytes() == content
    assert links(compiler) == (1 if damage == "nothing" else 2)
    norm, x = nn.BatchNorm2d(16), channels_last(2, 16, 4, 4)
    torch.testing.assert_close(fused.norm_relu(norm, x), F.relu(norm(x)))


def test_the_library_belongs_to_what_native_means_to_the_compiler(compiler):
    fused.enable()
    first = fused.kernels_hash()
    compiler.write_text(compiler.read_text().replace("esac", "    *-E*) echo '#define __AVX2__ 1' ;;\nesac"))
    compiled.load.cache_clear()
    fused.enable()
    assert fused.kernels_hash() != first
    assert links(compiler) == 2


def test_the_reason_given_is_the_first_line_that_says_error(compiler):
    compiler.write_text("#!/bin/sh\necho 'k.s: Assembler messages:\nk.s:3: Error: no such instruction' >&2; exit 1")
    with pytest.raises(fused.KernelsUnavailable, match=r"failed: k\.s:3: Error: no such instruction$"):
        fused.enable()


def test_a_compiler_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.load.cache_clear()
    try:
        none = str(tmp_path / "none")
        for compiler, message in (("false", "false failed"), (none, "No such file"), ("'g++", "CXX='g.*quotation")):
            monkeypatch.setenv("CXX", compiler)
            with pytest.raises(fused.KernelsUnavailable, match=message):
                fused.enable()
    finally:
        compiled.load.cache_clear()
