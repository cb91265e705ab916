"""The pretrained teacher sees images as it was trained to, and must know better than guessing."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import data
import model
from data.loader import Batches
from data.sources import Split
from main import with_networks
from model import published
from tests.helpers import fail, meta, succeed
from utils import checkpoint, options
from utils.checkpoint import Inputs, Meta
from utils.errors import UserError
from utils.files import from_plain, to_plain
from utils.normalization import NORMALIZATIONS
from utils.teacher import check_accuracy, load_teacher, pretrained_teacher

CPU = torch.device("cpu")
CIFAR, CIFAR100, IMAGENET = (NORMALIZATIONS[name] for name in ("cifar", "cifar100", "imagenet"))
GIVEN = ((0.3, 0.4, 0.5), (0.1, 0.2, 0.3))


def normalized(pixels, normalization):
    mean, std = (torch.tensor(values)[:, None, None] for values in normalization)
    return (pixels - mean) / std


def assert_same_answers(logits, expected):
    """But for rounding, which 20 layers without trained statistics amplify."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def akamaster(weights):
    names = {f"module.{key.replace('fc.', 'linear.')}": value for key, value in weights.items()}
    return {"state_dict": {key: value for key, value in names.items() if "num_batches_tracked" not in key}}


LAYOUTS = {
    "akamaster": ({"shortcut": "A"}, akamaster, IMAGENET),
    "GAL": ({"shortcut": "A"}, lambda w: {"state_dict": w}, CIFAR),
    "kuangliu": ({}, lambda w: {"net": w, "acc": 90.0, "epoch": 3}, CIFAR),
    "chenyaofo": ({}, lambda w: {key.replace("shortcut", "downsample"): value for key, value in w.items()}, GIVEN),
    "RepDistiller": ({}, lambda w: {"model": w}, GIVEN),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_teachers_see_the_normalization_of_their_project(tmp_path, layout):
    """The network alone, on pixels normalized as the project does, against the teacher on a data set's images."""
    variant, pack, expected = LAYOUTS[layout]
    network = model.build("resnet_20", **variant).eval()
    torch.save(pack(network.state_dict()), tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", "resnet_20", 10, CPU, given=GIVEN)[0]
    pixels = torch.rand(2, 3, 16, 16)
    assert_same_answers(teacher(normalized(pixels, GIVEN)), network(normalized(pixels, expected)))


def test_teacher_norm_overrules_what_is_known(tmp_path):
    network = model.build("resnet_20", shortcut="A").eval()
    torch.save(akamaster(network.state_dict()), tmp_path / "teacher.pt")
    pixels = torch.rand(2, 3, 16, 16)
    for norm, expected in {
        "cifar100": CIFAR100,
        "none": ((0, 0, 0), (1, 1, 1)),
        "0.1,0.2,0.3/1,2,4": ((0.1, 0.2, 0.3), (1, 2, 4)),
    }.items():
        teacher = load_teacher(tmp_path / "teacher.pt", "resnet_20", 10, CPU, given=GIVEN, norm=norm)[0]
        assert_same_answers(teacher(normalized(pixels, GIVEN)), network(normalized(pixels, expected)))


def test_exported_teacher_says_how_it_was_trained(tmp_path):
    network = model.build("resnet_20").eval()
    description = meta("resnet_20", mean=[0.1] * 3, std=[0.5] * 3)
    checkpoint.export(tmp_path / "resnet_20.pt", network, from_plain(Meta, description))
    teacher = load_teacher(tmp_path, "resnet_20", 10, CPU, given=GIVEN)[0]
    pixels = torch.rand(2, 3, 16, 16)
    expected = network(normalized(pixels, (description["mean"], description["std"])))
    assert_same_answers(teacher(normalized(pixels, GIVEN)), expected)
    with pytest.raises(ValueError, match="knows 10 classes, the data has 3"):
        load_teacher(tmp_path, "resnet_20", 3, CPU)


@pytest.mark.parametrize(
    ("arch", "name", "expected"),
    [
        ("torchvision", "resnet18", IMAGENET),
        ("torchvision", "googlenet", ((0.5,) * 3, (0.5,) * 3)),
        ("timm", "resnet18", IMAGENET),
        ("timm", "tf_efficientnet_b0.ap_in1k", ((0.5,) * 3, (0.5,) * 3)),
    ],
)
def test_libraries_state_the_normalization_of_their_weights(arch, name, expected):
    builder = partial(model.build, name, arch=arch)
    _, normalization, layout = published.load(builder().state_dict(), arch, name, builder, "a file")
    assert normalization == expected
    assert layout == f"state dict in the layout of {arch}"


def test_library_weights_load_as_their_files_are(tmp_path):
    """With the auxiliary classifiers of torchvision's GoogLeNet, and the old names of its DenseNets."""
    import torchvision

    network = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False).eval()
    torch.save(network.state_dict(), tmp_path / "googlenet.pth")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(load_teacher(tmp_path, "googlenet", 10, CPU, "torchvision")[0](x), network(x))

    network = torchvision.models.densenet121(num_classes=10).eval()
    old = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for key, v in network.state_dict().items()
    }
    assert old.keys() != network.state_dict().keys()
    torch.save(old, tmp_path / "densenet.pth")
    teacher = load_teacher(tmp_path / "densenet.pth", "densenet121", 10, CPU, "torchvision")[0]
    torch.testing.assert_close(teacher(x), network(x))


def test_safetensors_load(tmp_path):
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("resnet10t", num_classes=10).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_teacher(tmp_path, "resnet10t", 10, CPU, "timm")[0](x), network(x))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint: it is damaged"):
        load_teacher(tmp_path, "resnet10t", 10, CPU, "timm")


class Answers(torch.nn.Module):
    """Says what is written in an image's first pixel, as a share of 255."""

    def forward(self, x):
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), 10).float()


@pytest.mark.parametrize(("right", "works"), [(100, True), (56, True), (52, False), (0, False)])
def test_a_teacher_near_the_most_frequent_class_is_refused(right, works):
    targets = np.repeat([0, 1], 50)
    images = np.zeros((100, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.where(np.arange(100) < right, targets, 9)
    val = Batches(Split(images, targets), 10, (0, 0, 0), (1, 1, 1), CPU)
    if works:
        assert check_accuracy(Answers(), val, targets, force=False).top1 == right
    else:
        with pytest.raises(ValueError, match=f"{right}.00 % right .* guessing has 50.00 %.*--force"):
            check_accuracy(Answers(), val, targets, force=False)
        assert check_accuracy(Answers(), val, targets, force=True).top1 == right


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main.py", "finetune.py"])
def test_a_teacher_that_guesses_stops_the_run_unless_forced(runs, tmp_path, script):
    torch.manual_seed(0)
    torch.save(model.build("resnet_20").state_dict(), tmp_path / "teacher.pt")
    own = ("--teacher_model", "resnet_20", "--dataset", "digits") if script == "main.py" else runs.refine_flags
    flags = (*own, "--teacher_dir", tmp_path / "teacher.pt", "--num_epochs", 1, "--job_dir", tmp_path / "job")
    error = fail(script, *flags)
    assert "guessing has" in error
    assert "--force" in error
    assert not (tmp_path / "job").exists()
    assert "pretrained teacher: " in succeed(script, *flags, "--force")


def test_a_namespace_beside_the_weights_is_no_danger(tmp_path):
    import argparse

    network = model.build("resnet_20").eval()
    content = {"model": network.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, tmp_path / "teacher.pth")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(load_teacher(tmp_path, "resnet_20", 10, CPU)[0](x), network(x))


def of_digits(path, **changes):
    """An exported teacher of the digits, the data, and the flags of a run that takes it."""
    torch.manual_seed(0)
    network, dataset = model.build("resnet_20").eval(), data.load("digits", None, 0.1)
    about = {"classes": dataset.classes, "mean": dataset.mean, "std": dataset.std}
    checkpoint.export(path, network, from_plain(Meta, meta("resnet_20", **about | changes)))
    flags = ["--dataset", "digits", "--teacher_model", "resnet_20", "--teacher_dir", str(path)]
    return network, dataset, flags


def load(flags, dataset):
    return pretrained_teacher(replace(options.parse("main", flags), arch="resnet"), dataset, CPU)


def test_classes_in_another_order_are_matched_by_name(tmp_path):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    network, dataset, flags = of_digits(tmp_path / "teacher.pt", classes=list(map(str, order)))
    teacher, remarks = load(flags, dataset)
    images = torch.randn(2, 3, 8, 8)
    logits, given = network(images), teacher(images)
    for i, name in enumerate(order):
        torch.testing.assert_close(given[:, name], logits[:, i])
    assert "class 0 is '3' there and '0' in the data" in remarks[1]
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_other_classes_are_refused_unless_forced(tmp_path):
    network, dataset, flags = of_digits(tmp_path / "teacher.pt", classes=[*"01234567", "eight", "nine"])
    with pytest.raises(UserError, match=r"class 8 is 'eight' there and '8' in the data.*--force"):
        load(flags, dataset)
    teacher, _ = load([*flags, "--force"], dataset)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(teacher(images), network(images))


@pytest.mark.parametrize(("val_size", "works"), [(0.1, True), (0, True), (0.2, False), (144, False)])
def test_a_teacher_that_was_trained_on_the_validation_images_is_refused(tmp_path, val_size, works):
    """Its file says that it was trained with a validation split of 0.1."""
    _, _, flags = of_digits(tmp_path / "teacher.pt")
    dataset = data.load("digits", None, val_size)
    flags += ["--val_size", str(val_size)]
    if works:
        load(flags, dataset)
    else:
        with pytest.raises(UserError, match="validated on images that it was trained on; give --val_size"):
            load(flags, dataset)
        load([*flags, "--test_only"], dataset)  # which looks at no validation image


def test_the_same_validation_images_may_be_asked_for_in_another_way(tmp_path):
    """As a number rather than a share; a folder's own val/ does not depend on --val_size at all."""
    dataset = data.load("digits", None, 144)
    described = to_plain(Inputs(**data.load("digits", None, 0.1).fingerprints(None)))
    _, _, flags = of_digits(tmp_path / "teacher.pt", inputs=described)
    load([*flags, "--val_size", "144"], dataset)


def test_validation_images_are_known_by_their_pixels_not_by_the_name_of_the_data_set(tmp_path):
    digits = data.load("digits", None, 0.1)
    mirrored, grown = (
        replace(digits, **{name: replace(split, images=split.images[:, ::-1]) for name, split in splits.items()})
        for splits in ({"train": digits.train, "val": digits.val, "test": digits.test}, {"val": digits.val})
    )
    described = to_plain(Inputs(**digits.fingerprints(None)))
    elsewhere = meta()["config"] | {"dataset": "folder", "data_dir": "/gone"}
    _, _, flags = of_digits(tmp_path / "teacher.pt", inputs=described, config=elsewhere)
    with pytest.raises(UserError, match=r"give --val_size 0\.1"):
        load([*flags, "--val_size", "0.2"], data.load("digits", None, 0.2))  # known from a folder, under other names
    with pytest.raises(UserError, match="other validation images of the same data"):
        load(flags, grown)
    _, _, flags = of_digits(tmp_path / "teacher.pt", inputs=described, config=elsewhere | {"data_dir": str(tmp_path)})
    folder = ["--dataset", "folder", "--data_dir", str(tmp_path / "another"), "--val_size", "0.2"]
    load([*flags, *folder], mirrored)  # another folder


def test_a_public_checkpoint_s_accuracy_is_said_to_be_no_measure(tmp_path):
    torch.save(model.build("resnet_20").state_dict(), tmp_path / "public.pt")
    _, dataset, flags = of_digits(tmp_path / "teacher.pt")
    flags[-1] = str(tmp_path / "public.pt")
    assert "is no measure" in load(flags, dataset)[1][1]
    assert len(load([*flags, "--val_size", "0"], data.load("digits", None, 0))[1]) == 1  # it validates on the test set


@pytest.mark.slow
def test_a_teacher_of_another_family_of_this_project(tmp_path):
    """Its students, their file and the runs that go on from it need no further flag."""
    torch.manual_seed(0)
    torch.save({"net": model.build("densenet_40").state_dict()}, tmp_path / "teacher.pth")
    small = ("--dataset", "digits", "--num_epochs", 1, "--train_size", 32, "--val_size", 32)
    teacher = ("--teacher_dir", tmp_path / "teacher.pth", "--force")
    networks = ("--teacher_model", "densenet_40", "--student_model", "resnet_20_sparse")
    output = succeed("main.py", *small, *networks, *teacher, "--num_students", 1, "--job_dir", tmp_path / "job")
    assert f"{tmp_path / 'teacher.pth'}: state dict under 'net' in the layout of kuangliu/pytorch-cifar" in output
    assert "densenet_40 -> resnet_20_sparse" in output
    student = tmp_path / "job" / "resnet_pruned_18.pt"
    description = checkpoint.load_student(student)[1]
    assert (description["arch"], description["model"]) == ("resnet", "resnet_20_sparse")
    refine = ("--refine", student, "--pruned", *small[2:], *teacher)
    assert "densenet_40, standard" in succeed("finetune.py", *refine, "--job_dir", tmp_path / "refined")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet", "--teacher_model", "vgg_16_bn"], "vgg_16_bn_sparse is not a network of --arch resnet"),
        (["--arch", "vgg", "--teacher_model", "vgg_16_bn", "--student_model", "resnet_20_sparse"], "not a network of"),
        (["--arch", "resnt", "--teacher_model", "vgg_16_bn"], "unknown architecture 'resnt': try resnet"),
        (["--pretrain", "--arch", "vgg", "--teacher_model", "resnet_20"], "resnet_20 is not a network of --arch vgg"),
        (["--teacher_model", "vgg_16_bn", "--student_model", "resnet_21_sparse"], "unknown network 'resnet_21_sparse'"),
        (["--teacher_model", "vgg_16_bn_sparse"], "the teacher is the standard network"),
    ],
)
def test_contradictions_of_networks_and_architecture(flags, message):
    with pytest.raises(UserError, match=message):
        with_networks(options.parse("main", flags))
