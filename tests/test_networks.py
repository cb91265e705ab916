"""Networks: structure, keys and costs as published; gradients everywhere."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import model
from model import fused
from model.conv import KINDS, CheapConv2d, count_cheap
from model.fused import FusedSequential
from model.resnet import BottleneckBlock, StandardBlock, StudentBlock, variant_for
from utils.cost import count

CIFAR = (3, 32, 32)
IMAGENET = (3, 224, 224)


def smallest_input(name):
    """Images (2, 3, H, W) that are more than one pixel to the last BatchNorm, without which there is no gradient."""
    large = {"resnet_18": 64, "resnet_34": 64, "resnet_50": 64, "vgg_16_bn": 32, "vgg_19_bn": 32}
    size = large.get(name.removesuffix("_sparse"), 8)
    return torch.randn(2, 3, size, size)


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


@pytest.mark.parametrize(
    ("name", "arguments", "input_size", "params", "mega_macs"),
    [
        ("resnet_18", {"num_classes": 1000}, IMAGENET, 11_689_512, 1814.1),  # torchvision's tables, as the next two
        ("resnet_34", {"num_classes": 1000}, IMAGENET, 21_797_672, 3663.8),
        ("resnet_50", {"num_classes": 1000}, IMAGENET, 25_557_032, 4089.2),
        ("resnet_18", {"stem": "cifar"}, CIFAR, 11_173_962, 555.4),  # kuangliu/pytorch-cifar
        ("vgg_16_bn", {}, CIFAR, 14_728_266 - 4_224, 313.2),  # kuangliu's, less the biases of the convolutions
        ("vgg_19_bn", {}, CIFAR, 20_040_522 - 5_504, 398.1),
        ("vgg_16_bn", {"classifier": "mlp"}, CIFAR, 15_253_578 - 4_224, 313.7),  # chenyaofo/pytorch-cifar-models
        ("densenet_40", {}, CIFAR, 1_059_298, 282.9),  # arXiv 1608.06993, table 2: 1.0 M
        ("googlenet", {}, CIFAR, 6_166_250 - 7_904, 1521.8),  # kuangliu's, less the biases
    ],
)
def test_costs_are_as_published(name, arguments, input_size, params, mega_macs):
    cost = count(model.build(name, **arguments), input_size)
    assert cost.params == params
    assert cost.macs / 1e6 == pytest.approx(mega_macs, abs=0.05)


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


@pytest.mark.parametrize(
    ("name", "replaceable"),
    [
        *(("resnet_18", 16), ("resnet_34", 32), ("resnet_50", 16)),
        *(("vgg_16_bn", 12), ("vgg_19_bn", 15), ("densenet_40", 36), ("googlenet", 27)),
    ],
)
def test_every_convolution_but_the_stem_and_the_pointwise_ones_can_be_cheap(name, replaceable):
    network = model.build(f"{name}_sparse", pruned_num=replaceable)
    assert count_cheap(network) == replaceable
    spatial = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]
    assert sum(conv.groups == 1 for conv in spatial) == 1  # the stem


def test_names_lists_what_build_takes():
    assert {"resnet_20", "resnet_50_sparse", "vgg_16_bn", "densenet_40_sparse", "googlenet"} <= set(model.names())


@pytest.mark.parametrize("name", model.names())
def test_every_parameter_gets_a_gradient(name):
    for kind in KINDS if model.is_sparse(name) else KINDS[:1]:
        network = model.build(name, num_classes=7, conv=kind)
        features = network.forward_features(smallest_input(name))
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


ONE_OF_EACH = ["resnet_18", "resnet_50", "vgg_16_bn", "densenet_40", "googlenet"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_images_of_any_size_and_any_number_of_classes(name):
    network = model.build(f"{name}_sparse", num_classes=1).eval()
    for size in ((1, 1), (5, 9), (33, 18)):
        assert network(torch.randn(2, 3, *size)).shape == (2, 1)
    assert model.build(name, num_classes=1000)(smallest_input(name)).shape == (2, 1000)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_cheap_convolutions_stand_where_standard_ones_did(name):
    """A standard network with the dense convolutions that the cheap ones amount to computes the same."""
    torch.manual_seed(0)
    student, standard = model.build(f"{name}_sparse").eval(), model.build(name).eval()
    weights = {key: value for key, value in student.state_dict().items() if ".spatial." not in key}
    for key, module in student.named_modules():
        if isinstance(module, CheapConv2d):
            del weights[f"{key}.pointwise.weight"]
            weights[f"{key}.weight"] = module.dense_weight()
    standard.load_state_dict(weights)
    x = smallest_input(name)
    logits = standard(x)
    torch.testing.assert_close(student(x), logits, rtol=0, atol=1e-4 * logits.abs().max().item())


def test_a_sequential_is_run_as_its_parts(monkeypatch):
    """Runs of anything, BatchNorm and ReLU in one go, everything else as it is."""
    layers = [nn.MaxPool2d(2), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]
    calls = []
    run = fused.conv_norm_relu
    monkeypatch.setattr(fused, "conv_norm_relu", lambda conv, norm, x: calls.append((conv, norm)) or run(conv, norm, x))
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(FusedSequential(*layers)(x), nn.Sequential(*layers)(x))
    assert calls == [(layers[1], layers[2])]


@pytest.mark.parametrize(("name", "blocks"), [("resnet_18", StandardBlock), ("resnet_50", BottleneckBlock)])
def test_blocks_of_the_larger_resnets_keep_their_form(name, blocks):
    """Whatever is cheap in them: the student's form is of the CIFAR ResNets alone."""
    network = model.build(f"{name}_sparse", pruned_num=5)
    assert {type(block) for i in (1, 2, 3, 4) for block in network.get_submodule(f"layer{i}")} == {blocks}


def test_stem_suits_the_images():
    for name in ("resnet_18", "resnet_34", "resnet_50"):
        assert variant_for(name, (3, 63, 224)) == variant_for(name, (3, 224, 63)) == {"stem": "cifar"}
        assert variant_for(name, (3, 64, 64)) == {"stem": "imagenet"}
    assert variant_for("resnet_56", CIFAR) == {}


def test_unknown_variants_are_refused():
    for name, arguments in (
        ("resnet_18", {"stem": "large"}),
        ("resnet_20", {"shortcut": "C"}),
        ("vgg_16_bn", {"classifier": "none"}),
    ):
        with pytest.raises(ValueError, match=r"unknown .* choose from"):
            model.build(name, **arguments)


def bn(prefix):
    return [f"{prefix}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def expected_keys(blocks, cheap=()):
    """State-dict keys of a CIFAR ResNet as the contract names them; cheap: the suffixes of a convolution."""
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


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_keys_of_the_larger_resnets_are_those_of_torchvision(depth):
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    assert set(model.build(f"resnet_{depth}").state_dict()) == {
        key.replace("downsample", "shortcut") for key in theirs.state_dict()
    }


@pytest.mark.parametrize("depth", [16, 19])
def test_keys_of_vgg_features_are_those_of_torchvision(depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"vgg{depth}_bn")()
        biases = {f"{key}.bias" for key, module in theirs.named_modules() if isinstance(module, nn.Conv2d)}
        features = {key for key in theirs.state_dict() if key.startswith("features.")} - biases
        keys = {
            "linear": ["weight", "bias"],
            "mlp": [f"{i}.{x}" for i in (0, 3, 6) for x in ("weight", "bias")],
            "norm": [*("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"), *bn("norm1")],
        }
        for classifier, suffixes in keys.items():
            network = model.build(f"vgg_{depth}_bn", classifier=classifier)
            assert set(network.state_dict()) == features | {f"classifier.{suffix}" for suffix in suffixes}


def test_keys_of_densenet():
    keys = {"conv1.weight", *bn("bn"), "fc.weight", "fc.bias"}
    for prefix in (*(f"dense{i}.{j}" for i in (1, 2, 3) for j in range(12)), "trans1", "trans2"):
        keys |= {*bn(f"{prefix}.bn1"), f"{prefix}.conv1.weight"}
    assert set(model.build("densenet_40").state_dict()) == keys


def test_keys_of_googlenet():
    keys = {"pre_layers.0.weight", *bn("pre_layers.1"), "linear.weight", "linear.bias"}
    for inception in ("a3", "b3", "a4", "b4", "c4", "d4", "e4", "a5", "b5"):
        for conv in ("b1.0", "b2.0", "b2.3", "b3.0", "b3.3", "b3.6", "b4.1"):
            branch, place = conv.split(".")
            keys |= {f"{inception}.{conv}.weight", *bn(f"{inception}.{branch}.{int(place) + 1}")}
    assert set(model.build("googlenet").state_dict()) == keys


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
