"""Checkpoints as training scripts save them: what lies beside the weights, under which keys, in which folders."""

import collections
import datetime
import io
import os
import re
import sys
import types
import zipfile
from argparse import Namespace
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch

import model
from model.weights import read_weights
from tests.helpers import meta
from utils import checkpoint
from utils.checkpoint import Meta
from utils.files import from_plain
from utils.normalization import NORMALIZATIONS, describe, parse
from utils.teacher import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    weights = model.build("resnet_20").state_dict()
    for key, value in weights.items():
        if key.endswith("num_batches_tracked"):
            value.fill_(70_000)  # more than half precision can hold
    return weights


def load(content, path, name="resnet_20", **options):
    torch.save(content, path)
    return load_teacher(path, name, 10, CPU, **options)


def assert_loads(weights, content, path, name="resnet_20"):
    loaded = load(content, path, name)[0].state_dict()
    for key, value in weights.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(loaded[key], value)


# --- beside the weights


class History:
    """An object of a class of one's own."""


def of_a_training_script(weights):
    """Everything that the objects beside the weights have been seen to be, as RepDistiller and others save them."""
    network = model.build("resnet_20")
    network.load_state_dict(weights)
    optimizer = torch.optim.SGD(network.parameters(), np.float64(0.05), momentum=0.9)
    return {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "opt": Namespace(save=Path("save") / "student", data=PureWindowsPath("C:/data"), lr=np.float32(0.1)),
        "best_prec1": np.float64(92.5),
        "best_epoch": np.int64(3),
        "is_best": np.bool_(True),
        "history": collections.defaultdict(list, loss=[np.float64(1.5)], by_class={"cat": np.zeros(3)}),
        "recent": collections.deque([1.0, np.float32(2.0)], maxlen=20),
        "random": np.random.get_state(),  # noqa: NPY002, this is what scripts save
        "time": (datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc), datetime.timedelta(hours=3)),
        "other": [types.SimpleNamespace(a=range(3)), frozenset([1]), {1, 2}, 1j, b"", 10**30, np.str_("cosine")],
    }


@pytest.mark.parametrize("archive", [True, False])
def test_plain_values_beside_the_weights_are_no_obstacle(tmp_path, weights, archive):
    content = of_a_training_script(weights)
    assert type(content["optimizer"]["param_groups"][0]["lr"]) is np.float64
    path = tmp_path / "teacher.pth"
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    loaded = load_teacher(path, "resnet_20", 10, CPU)[0].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    for key, value in content.items():  # one at a time, so that a failure names it
        torch.save({key: value}, path, _use_new_zipfile_serialization=archive)
        assert read_weights(path).keys() == {key}


def test_numpy_values_of_older_versions_are_read(tmp_path):
    """Before numpy 2, its modules had other names."""
    buffer, path = io.BytesIO(), tmp_path / "old.pth"
    torch.save({"best": np.float64(92.5), "w": torch.ones(3)}, buffer)
    with zipfile.ZipFile(buffer) as new, zipfile.ZipFile(path, "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert torch.equal(read_weights(path)["w"], torch.ones(3))


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (History(), "tests.test_saved.History"),
        (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
        (Namespace(sampler=History()), "tests.test_saved.History"),
        (collections.defaultdict(os.getcwd), "posix.getcwd"),
    ],
)
def test_objects_of_other_classes_are_named(tmp_path, value, name, archive):
    torch.save({"state_dict": {}, "extra": value}, tmp_path / "a.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=rf"a\.pth cannot be read as a checkpoint: it has a {name}") as error:
        read_weights(tmp_path / "a.pth")
    assert "torch.save(network.state_dict()" in str(error.value)


class Reduced:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_constructors_of_plain_values_are_not_called(tmp_path):
    """Numpy would read 10 GB that the file does not have, Python reserve as much for the bytes."""
    values = [Reduced(np.ndarray, (10**10,)), Reduced(bytes, 10**10), Reduced(np.dtype, "V1000000000")]
    torch.save({"values": values, "w": torch.ones(3)}, tmp_path / "a.pth")
    content = read_weights(tmp_path / "a.pth")
    assert len(content["values"]) == 3
    assert not any(isinstance(value, np.ndarray | bytes | np.dtype) for value in content["values"])


# --- keys

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "module.student.", "model.backbone._orig_mod.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_keys_is_left_out(tmp_path, weights, prefix):
    assert_loads(weights, {"state_dict": {prefix + key: value for key, value in weights.items()}}, tmp_path / "a.pth")


def test_a_prefix_of_some_keys_is_a_difference(tmp_path, weights):
    some = {key if key.startswith("fc") else f"model.{key}": value for key, value in weights.items()}
    with pytest.raises(ValueError, match=r"missing, first conv1\.weight"):
        load(some, tmp_path / "a.pth")


def test_containers_within_the_network_are_left_out(tmp_path):
    """As torchvision's ImageNet script leaves them, which runs VGG's features alone in parallel."""
    weights = model.build("vgg_16_bn").state_dict()
    content = {key.replace("features.", "features.module."): value for key, value in weights.items()}
    assert_loads(weights, {"state_dict": content}, tmp_path / "a.pth", "vgg_16_bn")


def test_a_network_whose_own_keys_have_a_prefix(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, num_classes):\n"
        "        super().__init__()\n        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))\n"
    )
    arch, path = str(tmp_path / "net.py"), tmp_path / "a.pth"
    weights = model.build("Net", 10, arch=arch).state_dict()
    assert all(key.startswith("model.") for key in weights)
    for prefix in ("", "model.", "module.model."):
        torch.save({prefix + key: value for key, value in weights.items()}, path)
        loaded = load_teacher(path, "Net", 10, CPU, arch)[0].state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in weights.items())


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", "net", "network", "student_weights"])
def test_the_state_dict_may_be_under_any_key(tmp_path, weights, key):
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "optimizer": optimizer, key: weights, "metrics": {"accuracy": torch.tensor(90.0)}}
    assert_loads(weights, content, tmp_path / "a.pth")
    assert f"state dict under '{key}'" in load(content, tmp_path / "a.pth")[2]


def test_which_of_several_state_dicts(tmp_path, weights):
    """The usual key before others; the only one that matches; else none."""
    other = model.build("resnet_20").state_dict()
    assert_loads(weights, {"model_ema": other, "model": weights}, tmp_path / "a.pth")
    assert_loads(weights, {"teacher": model.build("resnet_32").state_dict(), "student": weights}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="several such state dicts, first, second: save one of them"):
        load({"first": weights, "second": other}, tmp_path / "a.pth")


def test_counters_in_half_precision_and_of_operations(tmp_path, weights):
    content = {key: value.half() for key, value in weights.items()}
    assert any(value.isinf().any() for value in content.values())  # the counters
    content |= {"total_ops": torch.zeros(1, dtype=torch.float64), "layer1.0.total_params": torch.zeros(1)}
    assert_loads({key: value.half().float() for key, value in weights.items()}, content, tmp_path / "a.pth")


# --- folders


@pytest.mark.parametrize("name", ["model_best.pth.tar", "last.ckpt", "pytorch_model.bin", "x.pth", "x.th"])
def test_the_only_checkpoint_of_a_folder(tmp_path, weights, name):
    torch.save({"state_dict": weights}, tmp_path / name)
    for other in (f"._{name}", "notes.txt", "features.tar", "training_args.bin"):
        (tmp_path / other).write_bytes(b"\0\5\26\7")
    loaded = load_teacher(tmp_path, "resnet_20", 10, CPU)[0].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    for i in range(9):
        torch.save({}, tmp_path / f"epoch_{i}.pth")
    with pytest.raises(ValueError, match=r"holds epoch_0\.pth, epoch_1\.pth, 8 more: name one"):
        load_teacher(tmp_path, "resnet_20", 10, CPU)


# --- the log


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda w: w, "this program; .*: that of the students, since none"),
        (
            lambda w: {"model": {key.replace("shortcut.", "downsample."): value for key, value in w.items()}},
            "chenyaofo/pytorch-cifar-models, RepDistiller, mdistiller; .*: that of the students, since none",
        ),
        (
            lambda w: {"model": {key.replace("fc.", "linear."): value for key, value in w.items()}},
            "several projects; .*: that of the students, since none",
        ),
        (lambda w: {"net": w}, "kuangliu/pytorch-cifar; normalization of the teacher: cifar$"),
        (
            lambda w: {"state_dict": {key.replace("fc.", "linear."): value for key, value in w.items()}},
            "akamaster/pytorch_resnet_cifar10; normalization of the teacher: imagenet$",
        ),
    ],
)
def test_the_log_states_the_layout_and_the_normalization(tmp_path, weights, wrap, expected):
    path, given = tmp_path / "a.pth", NORMALIZATIONS["cifar100"]
    assert re.search(rf"a\.pth: state dict .*in the layout of {expected}", load(wrap(weights), path, given=given)[2])
    remark = load(wrap(weights), path, given=given, norm="0.5,0.5,0.5/0.25,0.25,0.25")[2]
    assert remark.endswith("0.5,0.5,0.5/0.25,0.25,0.25 (--teacher_norm)")


def test_the_log_states_the_normalization_of_an_exported_teacher(tmp_path):
    network, path = model.build("resnet_20"), tmp_path / "resnet_20.pt"
    checkpoint.export(path, network, from_plain(Meta, meta("resnet_20", mean=[0.1] * 3, std=[0.5] * 3)))
    remark = load_teacher(path, "resnet_20", 10, CPU)[2]
    assert remark == f"{path}: exported by this program; normalization of the teacher: 0.1,0.1,0.1/0.5,0.5,0.5"


def test_normalizations_are_described_as_they_are_typed():
    for name, value in NORMALIZATIONS.items():
        assert describe(value) == name
    assert parse(describe(((0.1, 0.2, 0.3), (0.5, 0.25, 0.125)))) == ((0.1, 0.2, 0.3), (0.5, 0.25, 0.125))


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="needs the package safetensors, which is not installed: pip install"):
        load_teacher(tmp_path, "resnet_20", 10, CPU)
