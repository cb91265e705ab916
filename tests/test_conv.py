"""The cheap convolutions against slow, obvious references."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model.conv import KINDS, CheapConv2d, Shift2d, cheap_convs, count_cheap, subsample_first


def slow_shift(x, kernel_size):
    """The definition, an element at a time."""
    out = torch.zeros_like(x)
    _, channels, height, width = x.shape
    moved = kernel_size**2 * (channels // kernel_size**2)
    for c in range(channels):
        dx = c % kernel_size - kernel_size // 2 if c < moved else 0
        dy = (c // kernel_size) % kernel_size - kernel_size // 2 if c < moved else 0
        for y in range(height):
            for x_ in range(width):
                if 0 <= y + dy < height and 0 <= x_ + dx < width:
                    out[:, c, y, x_] = x[:, c, y + dy, x_ + dx]
    return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 7)])
@pytest.mark.parametrize(
    ("kernel_size", "channels"), [(3, 1), (3, 8), (3, 9), (3, 16), (3, 20), (5, 24), (5, 53), (7, 48), (7, 50)]
)
def test_shift_moves_each_channel_by_its_offset(kernel_size, channels, size, memory_format):
    x = torch.randn(2, channels, *size, dtype=torch.float64).to(memory_format=memory_format)
    out = Shift2d(channels, kernel_size)(x)
    assert torch.equal(out, slow_shift(x, kernel_size))
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 16, 50])
def test_shift_in_channels_last_gives_the_same_bits(channels, dtype):
    x = torch.randn(2, channels, 5, 6).to(dtype).requires_grad_()
    fast = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    shift, grad = Shift2d(channels), torch.randn(2, channels, 5, 6).to(dtype)
    out, expected = shift(fast), shift(x)
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.autograd.grad(out, fast, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel_size", "channels"), [(3, 7), (3, 20), (5, 27)])
def test_shift_gradient(kernel_size, channels, memory_format):
    x = torch.randn(1, channels, 3, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    shift = Shift2d(channels, kernel_size)
    assert torch.autograd.gradcheck(shift, x)
    assert torch.autograd.gradgradcheck(shift, x)


def test_shift_does_not_spread_an_infinity():
    x = torch.zeros(1, 9, 3, 3)
    x[0, 0, 1, 1] = torch.inf
    out = Shift2d(9)(x)
    assert out.isinf().sum() == 1
    assert not out.isnan().any()


def slow_conv(x, weight, stride, padding, groups):
    """A convolution as a sum over its definition."""
    out_channels, group_in, k, _ = weight.shape
    x = nn.functional.pad(x, [padding] * 4)
    height, width = ((size - k) // stride + 1 for size in x.shape[2:])
    out = x.new_zeros(len(x), out_channels, height, width)
    for o in range(out_channels):
        first = o // (out_channels // groups) * group_in
        for y in range(height):
            for x_ in range(width):
                window = x[:, first : first + group_in, y * stride : y * stride + k, x_ * stride : x_ * stride + k]
                out[:, o, y, x_] = (window * weight[o]).sum((1, 2, 3))
    return out


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_cheap_convolution_is_its_spatial_then_its_pointwise_stage(kind, stride, kernel_size):
    conv = CheapConv2d(12, 5, kernel_size, stride, kind, groups=3).double()
    x = torch.randn(2, 12, 7, 6, dtype=torch.float64)
    if kind == "shift":
        spatial = slow_shift(x, kernel_size)
    else:
        spatial = slow_conv(x, conv.spatial.weight, 1, kernel_size // 2, {"depthwise": 12, "group": 3}[kind])
    expected = slow_conv(spatial, conv.pointwise.weight, stride, 0, 1)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("depthwise", {"spatial.weight": (12, 1, 3, 3), "pointwise.weight": (5, 12, 1, 1)}),
        ("group", {"spatial.weight": (12, 4, 3, 3), "pointwise.weight": (5, 12, 1, 1)}),
        ("shift", {"pointwise.weight": (5, 12, 1, 1)}),
    ],
)
def test_state_dict_holds_the_weights_of_the_two_stages_alone(kind, keys):
    conv = CheapConv2d(12, 5, kind=kind, groups=3)
    assert {key: tuple(value.shape) for key, value in conv.state_dict().items()} == keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "group", "groups": 5}, "groups = 5 does not divide the 12 channels"),
        ({"kind": "group", "groups": 0}, "groups = 0"),
        ({"kind": "dense"}, "depthwise, group, shift"),
        ({"kernel_size": 4}, "odd kernel"),
    ],
)
def test_impossible_convolutions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CheapConv2d(12, 5, **arguments)


def test_plan_prunes_from_the_output_side():
    built = [conv(16, 16) for conv in cheap_convs(5, "shift", 4, pruned_num=2)]
    assert [count_cheap(conv) for conv in built] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("pruned_num", [-1, 6])
def test_plan_refuses_a_pruned_num_out_of_range(pruned_num):
    with pytest.raises(ValueError, match="5 replaceable convolutions"):
        cheap_convs(5, "shift", 4, pruned_num)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kernel_size": 5, "dilation": 2},
        {"kernel_size": (3, 5), "dilation": (2, 1), "padding": (1, 3)},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding_mode": "circular"},
        {"kernel_size": (5, 3), "padding": (1, 2), "padding_mode": "reflect", "dilation": (1, 2)},
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"},
    ],
)
@pytest.mark.parametrize("channels", [5, 41])
def test_a_shift_as_a_convolution_computes_the_same(channels, arguments):
    x = torch.randn(2, channels, 8, 7)
    shift = Shift2d(channels, **arguments)
    conv = shift.as_conv()
    assert torch.equal(conv(x), shift(x))
    assert not any(parameter.requires_grad for parameter in conv.parameters())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wide", [1, 3, 4, 8, 100])
@pytest.mark.parametrize(("kind", "groups"), [("depthwise", 4), ("group", 1), ("group", 4), ("group", 6), ("shift", 4)])
def test_the_convolutions_to_deploy_compute_what_the_cheap_one_does(kind, groups, wide, stride):
    torch.manual_seed(0)
    cheap = CheapConv2d(24, 20, stride=stride, kind=kind, groups=groups)
    x = torch.randn(2, 24, 7, 6)
    convs = cheap.as_convs(wide)
    torch.testing.assert_close(convs(x), cheap(x), rtol=1e-5, atol=1e-5)
    widths = [module.weight.shape[1] for module in convs.modules() if isinstance(module, nn.Conv2d)]
    assert kind != "group" or widths[0] >= min(wide, 24)


class StridesOfPointwise(TorchDispatchMode):
    """Collects the strides of the 1 x 1 convolutions that PyTorch computes, in both directions."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        backward = operator == torch.ops.aten.convolution_backward.default
        if backward or operator == torch.ops.aten.convolution.default:
            weight, stride = (args[2], args[4]) if backward else (args[1], args[3])
            if weight.shape[2:] == (1, 1):
                self.found.append(list(stride))
        return operator(*args, **(kwargs or {}))


USERS_NETWORK = """
from torch import nn

class Pointwise(nn.Conv2d):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, 1, stride)

def narrow(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), Pointwise(8, 6, (2, 1)), nn.Conv2d(6, 8, 1, (1, 3), padding="valid"),
                         nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("resnet_20", None),
        ("resnet_20_sparse", None),
        ("resnet18", "torchvision"),
        ("resnet18_sparse", "torchvision"),
        ("efficientvit_m0_sparse", "timm"),
        ("narrow", "file"),
        ("narrow_sparse", "file"),
    ],
)
def test_no_network_trains_a_strided_1x1_convolution_on_the_cpu(name, arch, tmp_path):
    """Its gradient is out of bounds in oneDNN; the pixels that it skips are dropped before."""
    if arch == "file":
        arch = str(tmp_path / "networks.py")
        (tmp_path / "networks.py").write_text(USERS_NETWORK)
    network = model.build(name, 3, arch=arch).to(memory_format=torch.channels_last)
    strided = [
        m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1
    ]
    assert strided
    size = 224 if arch == "timm" else 32
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with StridesOfPointwise() as strides:
        network(x).sum().backward()
    assert [1, 1] in strides.found
    assert all(stride == [1, 1] for stride in strides.found)


@pytest.mark.parametrize("stride", [2, (1, 3), (3, 2)])
@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, False)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_subsampled_convolution_is_the_strided_one(stride, groups, bias, memory_format):
    conv = nn.Conv2d(6, 4, 1, stride, groups=groups, bias=bias, dtype=torch.float64)
    subsampled = subsample_first(copy.deepcopy(conv))
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    out, expected = subsampled(x), conv(x)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=memory_format)
    pairs = zip(
        torch.autograd.grad(out, (x, *subsampled.parameters()), grad),
        torch.autograd.grad(expected, (x, *conv.parameters()), grad),
        strict=True,
    )
    for value, wanted in pairs:
        torch.testing.assert_close(value, wanted)
    assert torch.autograd.gradcheck(subsampled, x)
    assert torch.autograd.gradgradcheck(subsampled, x)
    torch.testing.assert_close(subsampled(x[0]), expected[0])


def test_a_subsampled_convolution_is_copied_saved_and_exported_as_any_other():
    conv = subsample_first(nn.Conv2d(3, 4, 1, 2))
    x = torch.randn(2, 3, 6, 6)
    assert type(conv) is nn.Conv2d
    assert conv.stride == (2, 2)
    assert conv.state_dict().keys() == {"weight", "bias"}
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        torch.testing.assert_close(other(x), conv(x))
        nn.init.zeros_(other.weight)
        nn.init.zeros_(other.bias)
        assert not other(x).any()
    exported = torch.export.export(conv, (x,)).graph.find_nodes(
        op="call_function", target=torch.ops.aten.conv2d.default
    )
    assert [node.args[3] for node in exported] == [[2, 2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": 5, "padding": "same"},
    ],
)
def test_attributes_are_those_of_the_convolution_that_it_replaces(kind, window):
    ours, theirs = CheapConv2d(8, 16, kind=kind, **window), nn.Conv2d(8, 16, **window)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(ours, name) == getattr(theirs, name), name
