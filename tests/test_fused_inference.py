"""Inference by the compiled kernels computes what PyTorch's operators compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from model import fused
from model.conv import KINDS, CheapConv2d, standard_conv
from model.kernels import library as compiled
from tests.helpers import channels_last, distance, random_norm

pytestmark = pytest.mark.usefixtures("kernels")


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
