"""Convolutions made cheap where they stand, in networks of this project and of others."""

import copy
import itertools

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from timm.layers.conv2d_same import conv2d_same
from torch import nn

import model
from model.conv import KINDS, CheapConv2d, Shift2d, count_cheap
from model.convert import cheapen, remarks
from model.weights import place
from tests.helpers import meta as network_meta
from utils.checkpoint import Meta, export, load_student
from utils.cost import check_fits

IMAGE = (3, 64, 64)


def one_hot_convolution(shift, conv):
    """The depthwise convolution, with the window of `conv`, that a shift stands for."""
    rows, columns = conv.kernel_size
    channels = conv.in_channels
    moved = channels - channels % (rows * columns)
    weight = torch.zeros(channels, 1, rows, columns)
    for c in range(channels):
        tap = (c // columns % rows, c % columns) if c < moved else (rows // 2, columns // 2)
        weight[c, 0, tap[0], tap[1]] = 1
    window = {"padding": conv.padding, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
    dense = nn.Conv2d(channels, channels, conv.kernel_size, groups=channels, bias=False, **window)
    dense.weight.data = weight
    return dense


WINDOWS = [
    arguments
    for arguments in itertools.product(
        [(3, 3), (1, 3), (2, 2), (5, 3)], [1, (2, 1)], [0, 1, (2, 1), 3, "same"], [1, 2], ["zeros", "reflect"]
    )
    if arguments[2] != "same" or arguments[1] == 1
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", KINDS)
def test_every_convolution_keeps_its_output_shape_bias_and_window(kind):
    for kernel_size, stride, padding, dilation, padding_mode in WINDOWS:
        bias = dilation == 1
        conv = nn.Conv2d(20, 7, kernel_size, stride, padding, dilation, bias=bias, padding_mode=padding_mode)
        network = nn.Sequential(nn.Conv2d(3, 20, 1), conv)
        x = torch.randn(2, 3, 12, 11)
        expected = network(x).shape
        assert cheapen(network, kind) == 1
        cheap = network[1]
        assert isinstance(cheap, CheapConv2d)
        assert network(x).shape == expected
        assert (cheap.pointwise.bias is not None) == bias
        if kind == "shift":
            features = network[0](x)
            torch.testing.assert_close(cheap.spatial(features), one_hot_convolution(cheap.spatial, conv)(features))
        else:
            assert (cheap.spatial.dilation, cheap.spatial.padding) == (conv.dilation, conv.padding)


def test_shift_gradient_with_a_window_of_its_own():
    shift = Shift2d(10, (3, 2), padding=(2, 0), dilation=(1, 2)).double()
    x = torch.randn(2, 10, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shift, x)


class Odd(nn.Module):
    """Everything that stays: the first convolution, 1 x 1, grouped ones and those of another class."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.kept = nn.ModuleList(
            [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 8, 3, padding=1)]
        )
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.again = self.inner[0]
        self.last = nn.Conv2d(8, 8, 5, padding=2)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.kept:
            x = conv(x)
        return self.last(self.again(self.inner(x)))


def test_what_is_no_standard_convolution_stays():
    network = Odd()
    before = copy.deepcopy(network)
    assert cheapen(network, "group", groups=2) == 2
    assert isinstance(network.last, CheapConv2d)
    assert isinstance(network.inner[0], CheapConv2d)
    assert network.again is network.inner[0]  # one convolution used twice stays one
    for old, new in zip([before.stem, *before.kept], [network.stem, *network.kept], strict=True):
        assert type(old) is type(new)
        assert torch.equal(old.weight, new.weight)


def test_pruned_num_counts_from_the_output_side_and_what_fails_changes_nothing():
    network = Odd()
    assert cheapen(network, pruned_num=1) == 1
    assert isinstance(network.last, CheapConv2d)
    assert type(network.inner[0]) is nn.Conv2d
    network = Odd()
    keys = list(network.state_dict())
    for arguments in ({"pruned_num": 3}, {"kind": "group", "groups": 3}, {"kind": "dense"}):
        with pytest.raises(ValueError, match=r"pruned_num = 3|groups = 3|'dense'"):
            cheapen(network, **arguments)
    assert list(network.state_dict()) == keys
    assert cheapen(network, pruned_num=0) == 0
    assert cheapen(nn.Sequential(nn.Conv2d(3, 8, 3))) == 0


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_padded_as_tensorflow_does_are_cheap_with_that_padding(kind):
    """Against timm's conv2d_same with the dense weight that both stages amount to; it depends on the size."""
    windows = itertools.product([3, 2, (1, 5)], [1, 2, (3, 1)], [1, 2], [(7, 8), (6, 9), (1, 2)])
    for kernel_size, stride, dilation, size in windows:
        network = nn.Sequential(nn.Conv2d(3, 18, 1), Conv2dSame(18, 6, kernel_size, stride, dilation=dilation))
        x = torch.randn(2, 3, *size)
        conv, expected = network[1], network(x).shape
        assert cheapen(network, kind, groups=2) == 1
        cheap = network[1]
        spatial = one_hot_convolution(cheap.spatial, conv) if kind == "shift" else cheap.spatial
        mixing = cheap.pointwise.weight.reshape(6, spatial.groups, -1)
        filters = spatial.weight.reshape(spatial.groups, 18 // spatial.groups, -1)
        weight = torch.einsum("ogm,gmi->ogi", mixing, filters).reshape(6, 18, *cheap.kernel_size)
        window = {"stride": cheap.stride, "dilation": cheap.dilation}
        out = network(x)
        assert out.shape == expected
        torch.testing.assert_close(out, conv2d_same(network[0](x), weight, cheap.pointwise.bias, **window))


def padded_as_tensorflow():
    """Two convolutions that rule 1 made cheap, and a third behind them."""
    convs = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), Conv2dSame(8, 8, 3, stride=2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def test_pruned_num_counts_what_was_replaceable_when_the_file_was_written(tmp_path):
    source = "from tests.test_convert import padded_as_tensorflow\n\ndef build():\n    return padded_as_tensorflow()\n"
    (tmp_path / "net.py").write_text(source)
    network = padded_as_tensorflow()
    assert cheapen(network, pruned_num=1) == 1
    assert isinstance(network[3], CheapConv2d)
    network = padded_as_tensorflow()
    assert cheapen(network, pruned_num=1, rule=1) == 1
    assert isinstance(network[2], CheapConv2d)
    older = network_meta(arch=str(tmp_path / "net.py"), model="build_sparse", conv="depthwise", pruned_num=1)
    export(tmp_path / "older.pt", network, Meta(**older))
    assert "rule" not in torch.load(tmp_path / "older.pt", weights_only=True)["meta"]
    loaded, _ = load_student(tmp_path / "older.pt", older["arch"])
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), network.eval()(x))


def test_other_classes_of_convolutions_stay_and_are_counted():
    convs = ScaledStdConv2d(8, 8, 3), ScaledStdConv2d(8, 8, 3), ScaledStdConv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), *convs)
    assert cheapen(network) == 1
    (line,) = remarks(network)
    assert line.startswith("2 ScaledStdConv2d stay standard")
    assert remarks(nn.Sequential(nn.Conv2d(3, 8, 3), Conv2dSame(8, 8, 3))) == []


def test_a_network_that_hardly_shrinks_is_named():
    def network(wide):
        """The convolution's 10 * 10 * 9 weights become 10 * 9 + 10 * 10, 710 fewer."""
        made = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 3), nn.Conv2d(10, wide, 1, bias=False))
        cheapen(made)
        return made

    assert remarks(network(615)) == []  # 710 of 40 + 910 + 6150 parameters, a tenth
    (line,) = remarks(network(616))
    assert line.startswith("the student keeps 90.0% of the parameters")
    assert remarks(nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 3))) == []  # a standard network


def test_type_and_mode_carry_over():
    network = Odd().double().eval()
    cheapen(network)
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet_18", "resnet_50", "vgg_16_bn", "densenet_40", "googlenet"])
def test_a_converted_network_is_the_native_student(name, kind):
    converted, native = model.build(name), model.build(f"{name}_sparse", conv=kind)
    assert cheapen(converted, kind) == count_cheap(native)
    assert {key: value.shape for key, value in converted.state_dict().items()} == {
        key: value.shape for key, value in native.state_dict().items()
    }
    converted.load_state_dict(native.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(converted.eval()(x), native.eval()(x))


def test_weights_of_five_axes_do_not_change_their_layout():
    """torch's own conversion to channels_last refuses them."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(1, 1, (1, 3, 3)), nn.Linear(3, 3))
    place(network, "cpu")
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].weight.is_contiguous()
    network = model.build("lambda_resnet26t_sparse", arch="timm", input_size=IMAGE)
    check_fits(network, "lambda_resnet26t_sparse", IMAGE, 10)
