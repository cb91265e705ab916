"""Networks of torchvision, timm and a user's file, and the functions that are none."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

import model
from model import external
from model.conv import count_cheap
from model.convert import cheapen
from model.split import check_features
from tests.helpers import fail, report_of, succeed
from utils.checkpoint import load_student

IMAGE = (3, 64, 64)


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
