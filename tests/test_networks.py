"""Networks: structure, keys and costs as published; gradients everywhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from model.conv import KINDS, CheapConv2d, count_cheap
from model.resnet import StandardBlock, StudentBlock
from utils.cost import count

CIFAR = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "arguments", "params", "mega_macs"),
    [
        ("resnet_56", {"shortcut": "A"}, 853_018, 125.49),
        ("resnet_56", {"shortcut": "B"}, 855_770, 125.75),
        ("resnet_56_sparse", {"conv": "shift"}, 102_106, 15.39),
        ("resnet_56_sparse", {"conv": "depthwise"}, 119_818, 20.47),
        ("resnet_56_sparse", {"conv": "group", "groups": 4}, 311_194, 50.8),
    ],
)
def test_costs_are_those_of_the_paper(name, arguments, params, mega_macs):
    cost = count(model.build(name, **arguments), CIFAR)
    assert cost.params == params
    assert cost.macs / 1e6 == pytest.approx(mega_macs, abs=0.05 if mega_macs == 50.8 else 0.006)


@pytest.mark.parametrize(
    ("groups", "kilo_params", "mega_macs"), [(2, 520, 86.2), (4, 311, 50.8), (8, 207, 33.1), (16, 154, 24.2)]
)
def test_costs_of_group_convolutions(groups, kilo_params, mega_macs):
    cost = count(model.build("resnet_56_sparse", conv="group", groups=groups), CIFAR)
    assert round(cost.params / 1e3) == kilo_params
    assert round(cost.macs / 1e6, 1) == mega_macs


def test_counting_computes_nothing_and_leaves_the_model_alone():
    network = model.build("resnet_20").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    count(network, CIFAR)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_convolutions_and_the_classifier(depth):
    network = model.build(f"resnet_{depth}", shortcut="A")
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert count_cheap(model.build(f"resnet_{depth}_sparse")) == depth - 2


def test_names_lists_what_build_takes():
    assert {"resnet_20", "resnet_56", "resnet_56_sparse", "resnet_110_sparse"} <= set(model.names())


@pytest.mark.parametrize("name", model.names())
def test_every_parameter_gets_a_gradient(name):
    for kind in KINDS if model.is_sparse(name) else KINDS[:1]:
        network = model.build(name, num_classes=7, conv=kind)
        features = network.forward_features(torch.randn(2, 3, 8, 8))
        assert features.shape[:2] == (2, network.num_features)
        logits = network.forward_head(features)
        assert logits.shape == (2, 7)
        F.cross_entropy(logits, torch.tensor([1, 6])).backward()
        dead = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        assert not dead


def test_forward_is_head_of_features():
    network = model.build("resnet_20_sparse").eval()
    x = torch.randn(2, 3, 9, 11)
    assert torch.equal(network(x), network.forward_head(network.forward_features(x)))


def expected_keys(blocks, cheap=()):
    """State-dict keys of a CIFAR ResNet as the contract names them; cheap: the suffixes of a convolution."""

    def bn(prefix):
        return [f"{prefix}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["conv1.weight", *bn("bn1"), "fc.weight", "fc.bias"]
    for stage in (1, 2, 3):
        for i in range(blocks):
            block = f"layer{stage}.{i}"
            for n in (1, 2):
                keys += [f"{block}.conv{n}{suffix}.weight" for suffix in (cheap or ("",))] + bn(f"{block}.bn{n}")
            if stage > 1 and i == 0:
                keys += [f"{block}.shortcut.0.weight", *bn(f"{block}.shortcut.1")]
    return set(keys)


def test_state_dict_keys():
    assert set(model.build("resnet_20").state_dict()) == expected_keys(3)
    both = (".spatial", ".pointwise")
    assert set(model.build("resnet_20_sparse", conv="depthwise").state_dict()) == expected_keys(3, both)
    assert set(model.build("resnet_20_sparse", conv="group").state_dict()) == expected_keys(3, both)
    assert set(model.build("resnet_20_sparse", conv="shift").state_dict()) == expected_keys(3, both[1:])


@pytest.mark.parametrize("pruned_num", [0, 1, 4, 11, 18])
def test_pruned_num_replaces_the_last_convolutions(pruned_num):
    network = model.build("resnet_20_sparse", pruned_num=pruned_num)
    blocks = [block for layer in (network.layer1, network.layer2, network.layer3) for block in layer]
    cheap = [isinstance(conv, CheapConv2d) for block in blocks for conv in (block.conv1, block.conv2)]
    assert cheap == [False] * (18 - pruned_num) + [True] * pruned_num
    students = -(-pruned_num // 2)  # a block with one cheap convolution takes the student form too
    assert [type(block) for block in blocks] == [StandardBlock] * (9 - students) + [StudentBlock] * students


@pytest.mark.parametrize(("block", "form"), [(StandardBlock, "standard"), (StudentBlock, "student")])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_forms(block, form, stride):
    """Where the stride sits and where the last ReLU comes, against the formula written out."""
    network = model.build("resnet_20" if form == "standard" else "resnet_20_sparse", conv="depthwise").double().eval()
    layer = network.layer2[0 if stride == 2 else 1]
    assert isinstance(layer, block)
    x = torch.randn(2, 16 if stride == 2 else 32, 6, 6, dtype=torch.float64)

    def conv(stage, x, stride):
        if form == "standard":
            return F.conv2d(x, stage.weight, stride=stride, padding=1)
        spatial = F.conv2d(x, stage.spatial.weight, padding=1, groups=x.shape[1])
        return F.conv2d(spatial, stage.pointwise.weight, stride=stride)

    first, second = (stride, 1) if form == "standard" else (1, stride)
    out = layer.bn2(conv(layer.conv2, layer.bn1(conv(layer.conv1, x, first)).clamp(min=0), second))
    skip = x if stride == 1 else layer.shortcut[1](F.conv2d(x, layer.shortcut[0].weight, stride=2))
    expected = (out + skip).clamp(min=0) if form == "standard" else out.clamp(min=0) + skip
    torch.testing.assert_close(layer(x), expected)


def test_half_pruned_block_keeps_the_stride_of_the_student_form():
    network = model.build("resnet_20_sparse", pruned_num=5)  # layer3.0 has a standard conv1 and a cheap conv2
    block = network.layer3[0]
    assert isinstance(block, StudentBlock)
    assert block.conv1.stride == (1, 1)
    assert block.conv2.pointwise.stride == (2, 2)


def test_padding_shortcut_subsamples_and_pads_half_the_new_channels_on_each_side():
    shortcut = model.build("resnet_20", shortcut="A").layer2[0].shortcut
    x = torch.randn(2, 16, 5, 5)
    out = shortcut(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
    assert not list(shortcut.state_dict())


def test_initialization():
    """Kaiming normal: std = sqrt(2 / fan in), with the fan of a depthwise filter its own k^2."""
    torch.manual_seed(0)
    network = model.build("resnet_110_sparse", conv="depthwise")
    spatial = torch.cat([block.conv1.spatial.weight.flatten() for block in network.layer3])
    pointwise = torch.cat([block.conv2.pointwise.weight.flatten() for block in network.layer3])
    assert spatial.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert pointwise.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_unknown_names_list_the_close_ones():
    with pytest.raises(ValueError, match=r"resnet_57.*resnet_56"):
        model.build("resnet_57")
    with pytest.raises(ValueError, match="groups = 5"):
        model.build("resnet_56_sparse", conv="group", groups=5)
    with pytest.raises(ValueError, match="54 replaceable"):
        model.build("resnet_56_sparse", pruned_num=55)
