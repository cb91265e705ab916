"""Other projects' networks: their convolutions made cheap where they stand, and timm's protocol put on them."""

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import Conv2dSame, ScaledStdConv2d
from timm.layers.conv2d_same import conv2d_same
from torch import nn

import model
from model import external
from model.conv import KINDS, CheapConv2d, Shift2d, count_cheap
from model.convert import cheapen, remarks
from model.split import check_features
from model.weights import place
from tests.helpers import fail, report_of, succeed
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


# --- torchvision and timm


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 512), ("squeezenet1_1", 512), ("alexnet", 256), ("densenet121", 1024), ("googlenet", 1024)],
)
def test_torchvision_networks_get_a_feature_map_before_their_pooling(name, channels):
    network = model.build(f"{name}_sparse", 7, "shift", arch="torchvision", input_size=IMAGE).eval()
    plain = external.standard("torchvision", name, 7)
    count = cheapen(plain, "shift")
    assert count == count_cheap(network) > 0
    plain.eval().load_state_dict(network.state_dict())  # the keys are those of torchvision's network
    x = torch.randn(2, *IMAGE)
    features = network.forward_features(x)
    assert features.dim() == 4
    assert features.shape[1] == network.num_features == channels
    torch.testing.assert_close(network.forward_head(features), plain(x))
    torch.testing.assert_close(network(x), plain(x))


def test_a_copy_of_a_split_network_has_weights_of_its_own():
    network = model.build("squeezenet1_1_sparse", arch="torchvision", input_size=IMAGE).eval()
    x = torch.randn(1, *IMAGE)
    expected = network(x)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not other(x).any()
    assert torch.equal(network(x), expected)


def test_timm_networks_are_students_as_they_are():
    network = model.build("resnet10t_sparse", 5, "group", groups=2, arch="timm", input_size=IMAGE)
    assert count_cheap(network) == 10
    assert network.forward_features(torch.randn(2, *IMAGE)).shape == (2, network.num_features, 2, 2)
    plain = timm.create_model("resnet10t", num_classes=5)
    assert type(network) is type(plain)


@pytest.mark.parametrize(
    ("arch", "name", "size", "message"),
    [
        ("torchvision", "resnet_18", 64, "torchvision has no network 'resnet_18': try resnet18"),
        ("timm", "resnet_18", 64, "timm has no network"),
        ("timm", "nf_resnet26", 64, r"but the first \(8 ScaledStdConv2d stay as they are\)"),
        ("torchvision", "mobilenet_v2", 64, "no standard convolution to make cheap"),
        ("torchvision", "vit_b_16", 64, "no standard convolution to make cheap"),
        ("nowhere.py", "build", 64, "nowhere.py does not exist"),
    ],
)
def test_networks_that_cannot_be_students(arch, name, size, message):
    with pytest.raises(ValueError, match=message):
        model.build(f"{name}_sparse", arch=arch, input_size=(3, size, size))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (64, "levit_128 does not take images of 64 x 64"),
        (224, r"levit_128 has no feature map \(B, 384, H, W\) for this --method"),
    ],
)
def test_networks_without_a_feature_map(size, message):
    network = model.build("levit_128_sparse", arch="timm", input_size=(3, size, size))
    with pytest.raises(ValueError, match=message):
        check_features(network, "levit_128", (3, size, size))


def test_weights_of_five_axes_do_not_change_their_layout():
    """torch's own conversion to channels_last refuses them."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(1, 1, (1, 3, 3)), nn.Linear(3, 3))
    place(network, "cpu")
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].weight.is_contiguous()
    network = model.build("lambda_resnet26t_sparse", arch="timm", input_size=IMAGE)
    check_fits(network, "lambda_resnet26t_sparse", IMAGE, 10)


# --- a Python file

SOURCE = """
import torch.nn.functional as F
from torch import nn

class Own(nn.Conv2d):
    pass

class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.conv4 = Own(32, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 4 * 4, num_classes)

    def forward(self, x):
        x = F.relu(self.conv4(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))))
        x = x.view(x.size(0), -1)  # as many people write it: not for channels_last
        return self.fc(F.dropout(x, 0.5, training=self.training))

def small(num_classes=10):
    return Small(num_classes)

def ten():
    return Small(10)

def text():
    return "a network"

class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x if len(x) > 0 else -x)

def branching(num_classes):
    return Branching(nn.Conv2d(3, 8, 3), nn.Conv2d(8, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my nets" / "net.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def test_halves_of_forward_follow_the_mode(file):
    network = model.build("small_sparse", arch=str(file), input_size=(3, 8, 8)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    features = network.eval().forward_features(x)
    assert features.shape == (2, 32, 4, 4)
    logits = F.linear(features.flatten(1), network.fc.weight, network.fc.bias)
    torch.testing.assert_close(network.forward_head(features), logits)
    assert not torch.equal(network.train().forward_head(features), logits)  # dropout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "returned a str"),
        ("missing", "defines no function 'missing': it has Own, Small, small, ten"),
    ],
)
def test_functions_that_build_no_student(file, name, message):
    with pytest.raises(ValueError, match=message):
        model.build(f"{name}_sparse", arch=str(file), input_size=(3, 8, 8))


def test_only_an_online_teacher_and_attention_need_a_feature_map(file, tmp_path):
    """Plain training and knowledge distillation look at logits alone, and so do the files that they write."""
    job, teacher = tmp_path / "job", tmp_path / "teacher.pt"
    torch.save(model.build("branching", 10, arch=str(file)).state_dict(), teacher)
    network = ("--arch", file, "--teacher_model", "branching")
    common = ("--dataset", "digits", "--num_epochs", 1, "--train_size", 32, "--val_size", 64)
    for method in ("od", "okddip"):
        error = fail("main.py", *network, *common, "--method", method, "--job_dir", job)
        assert "Branching cannot be split" in error
        assert "give it forward_features, forward_head, num_features" in error
        assert not job.exists()
    teaching = ("--method", "kd", "--teacher_dir", teacher, "--force")
    assert "exported" in succeed("main.py", *network, *common, *teaching, "--job_dir", job)
    (exported,) = job.glob("*pruned*.pt")
    logits = load_student(exported, str(file))[0](torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 10)


@pytest.mark.slow
def test_a_network_of_a_file_goes_all_the_way(file, tmp_path):
    common = ("--dataset", "digits", "--arch", file, "--teacher_model", "small", "--num_epochs", 1, "--lr", 0.02)
    succeed("main.py", *common, "--pretrain", "--job_dir", tmp_path / "teacher")
    teacher = ("--teacher_dir", tmp_path / "teacher", "--force")
    output = succeed("main.py", *common, *teacher, "--num_students", 2, "--job_dir", tmp_path / "students")
    assert "1 Own stay standard" in output
    refine = ("--refine", tmp_path / "students" / "net_pruned_2.pt", "--pruned", "--num_epochs", 1)
    error = fail("finetune.py", *refine, "--job_dir", tmp_path / "refined")
    assert "needs the code that built its network: give --arch" in error
    succeed("finetune.py", *refine, "--arch", file, "--job_dir", tmp_path / "refined")
    standard = report_of(tmp_path / "refined")["networks"][0]
    assert standard["name"] == "small, standard"
    assert standard["params"] == sum(p.numel() for p in model.build("small", arch=str(file)).parameters())


@pytest.mark.slow
def test_a_network_of_torchvision_with_pretrained_weights_goes_all_the_way(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "resnet18.pth")
    common = ("--dataset", "digits", "--arch", "torchvision", "--teacher_model", "resnet18", "--num_epochs", 1)
    students = ("--num_students", 2, "--teacher_dir", tmp_path / "resnet18.pth", "--force")
    succeed("main.py", *common, *students, "--job_dir", tmp_path / "students")
    refine = ("--refine", tmp_path / "students" / "torchvision_pruned_16.pt", "--pruned", "--test_only")
    assert "% on the test set" in succeed("finetune.py", *refine)


def test_images_and_classes_that_do_not_fit_end_in_one_line(file, tmp_path):
    common = ("--dataset", "digits", "--num_students", 2, "--job_dir", tmp_path / "job", "--val_size", 700)
    error = fail("main.py", "--arch", "torchvision", "--teacher_model", "squeezenet1_1", *common)
    assert "squeezenet1_1_sparse does not take images of 8 x 8" in error
    source = file.read_text().replace("return Small(10)", "return Small(7)")
    file.write_text(source)
    error = fail("main.py", "--arch", file, "--teacher_model", "ten", *common)
    assert "ten_sparse gives (7,) for an image, not the logits of 10 classes" in error
    assert not (tmp_path / "job").exists()
