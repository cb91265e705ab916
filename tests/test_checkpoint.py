"""Exported networks, training checkpoints and pretrained teachers: what loads, and what is refused."""

import os
import pickle
from types import SimpleNamespace

import pytest
import torch

import model
from tests.helpers import content_of, meta
from utils import checkpoint
from utils.checkpoint import ExportedNetwork, Meta
from utils.files import from_plain, to_plain
from utils.teacher import find_file, load_teacher

CPU = torch.device("cpu")


def exported(path, seed=0, **changes):
    torch.manual_seed(seed)
    description = meta(**changes)
    network = model.build(description["model"], 10, conv="group", groups=8, pruned_num=description["pruned_num"])
    checkpoint.export(path, network, from_plain(Meta, description))
    return network.eval()


def randomize(network):
    """Give BatchNorm something to remember, so that a file that loses it shows."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_(1, 0.2)
    return network.eval()


def test_exported_student_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    network = randomize(model.build("resnet_20_sparse", 7, conv="group", groups=8, pruned_num=5))
    description = meta(num_classes=7, classes=list("abcdefg"), mean=[0.1, 0.2, 0.3], accuracy={"test": 12.5})
    checkpoint.export(tmp_path / "student.pt", network, from_plain(Meta, description))
    restored, restored_meta = checkpoint.load_student(str(tmp_path / "student.pt"))
    assert restored_meta == description
    assert not restored.training
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(restored(x), network(x))


def test_exported_file_is_the_same_whatever_its_name(tmp_path):
    """So that files of two runs can be compared to the byte."""
    exported(tmp_path / "a.pt")
    exported(tmp_path / "other name.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "other name.pt").read_bytes()


def training_checkpoint(path, accuracies=(50.0, 70.0, 60.0)):
    torch.manual_seed(0)
    students = [model.build("resnet_20_sparse", 10, conv="group", groups=8, pruned_num=5) for _ in accuracies]
    learner = model.online.OnlineTeacher(students, 10)
    content = {
        "kind": "training checkpoint",
        "epoch": 3,
        "model": learner.state_dict(),
        "optimizer": torch.optim.SGD(learner.parameters()).state_dict(),
        "scores": {"accuracy": {"students": list(accuracies)}, "loss": {"students": [1.0] * len(accuracies)}},
        "best": {"epoch": 3, "student": accuracies.index(max(accuracies)), "accuracy": max(accuracies), "loss": 1.0},
        "meta": meta(num_students=len(accuracies)),
    }
    torch.save(content, path)
    return learner.eval()


def test_best_student_is_taken_out_of_a_training_checkpoint(tmp_path):
    learner = training_checkpoint(tmp_path / "last.pt")
    student, description = checkpoint.best_student(tmp_path / "last.pt")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(student(x), learner.students[1](x))
    assert to_plain(description) == meta(num_students=3)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def write_pickle(path):
    with open(path, "wb") as file:
        pickle.dump({"state_dict": Payload(path.parent / "ran")}, file)


def write_malicious(path):
    torch.save({"state_dict": Payload(path.parent / "ran")}, path)


def write_truncated(path):
    exported(path)
    path.write_bytes(path.read_bytes()[:-5000])


def write_truncated_legacy(path):
    torch.save(model.build("resnet_20").state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:14017])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no checkpoint at all"),
        write_truncated,
        write_truncated_legacy,
        write_pickle,
        write_malicious,
        lambda path: torch.save([1, 2, 3], path),
        lambda path: torch.save({"kind": "exported network"}, path),
        lambda path: torch.save({"kind": "exported network", "state_dict": {}, "meta": {}}, path),
    ],
    ids=["missing", "folder", "empty", "text", "truncated", "legacy", "pickle", "malicious", "list", "bare", "hollow"],
)
@pytest.mark.parametrize("read", [checkpoint.load_student, checkpoint.best_student])
def test_files_that_are_no_student_are_refused_in_one_line(tmp_path, write, read):
    path = tmp_path / "file.pt"
    write(path)
    with pytest.raises(ValueError, match=r"file\.pt") as error:
        read(path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_the_two_kinds_of_file_are_told_apart(tmp_path):
    exported(tmp_path / "student.pt")
    training_checkpoint(tmp_path / "last.pt")
    with pytest.raises(ValueError, match="leave out --pruned"):
        checkpoint.load_student(tmp_path / "last.pt")
    with pytest.raises(ValueError, match="with --pruned"):
        checkpoint.best_student(tmp_path / "student.pt")


def change(path, edit):
    content = content_of(path)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["state_dict"].pop("layer2.0.conv1.weight"), r"1 missing, first layer2\.0\.conv1\.weight"),
        (lambda c: c["state_dict"].update(extra=torch.zeros(1)), "1 unexpected, first extra"),
        (lambda c: c["state_dict"].update({"fc.bias": torch.zeros(9)}), r"fc\.bias is \(9,\) in the file, \(10,\)"),
        (lambda c: c["state_dict"]["bn1.running_var"].fill_(torch.nan), r"bn1\.running_var holds values"),
        (lambda c: c["meta"].update(pruned_num=99), "does not say how to build"),
        (lambda c: c["meta"].update(model="resnet_21_sparse"), "does not say how to build"),
        (lambda c: c["meta"].pop("pruned_num"), r"meta\.pruned_num is missing or malformed"),
        (lambda c: c["meta"].pop("arch"), r"meta\.arch is missing or malformed"),
        (lambda c: c.update(kind=[1]), "is no exported network of main"),
        (lambda c: c.update(state_dict={"fc.bias": 3}), "state_dict is missing or malformed"),
    ],
)
def test_weights_that_do_not_match_are_never_loaded(tmp_path, edit, message):
    exported(tmp_path / "student.pt")
    change(tmp_path / "student.pt", edit)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_student(tmp_path / "student.pt")


@pytest.mark.parametrize("state", [torch.zeros(9, dtype=torch.uint8), torch.get_rng_state().float()])
def test_random_numbers_that_pytorch_cannot_go_on_from_are_refused(tmp_path, state):
    progress = {"position": 1, "names": ["loss"], "losses": torch.ones(1, 1), "sizes": torch.ones(1)}
    progress |= {"correct": torch.ones(1), "random": {"cpu": torch.get_rng_state()}}
    training_checkpoint(tmp_path / "last.pt")
    change(tmp_path / "last.pt", lambda content: content.update(progress=progress))
    assert checkpoint.load(tmp_path / "last.pt").progress.position == 1
    change(tmp_path / "last.pt", lambda content: content["progress"]["random"].update(cpu=state))
    with pytest.raises(ValueError, match="is no whole training checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_failed_write_leaves_the_old_file(tmp_path):
    exported(tmp_path / "student.pt")
    before = (tmp_path / "student.pt").read_bytes()
    with pytest.raises(AttributeError):  # what pickle says of a local function
        checkpoint.save(tmp_path / "student.pt", ExportedNetwork({"fc.weight": lambda: None}, from_plain(Meta, meta())))
    assert (tmp_path / "student.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["student.pt"]


# --- pretrained teachers


def plain_resnet(weights, x, blocks=3):
    """ResNet-20 from a state dict, written out with functions; independent of the project's modules."""
    functional = torch.nn.functional

    def bn(x, prefix):
        w = {name: weights[f"{prefix}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")}
        return functional.batch_norm(x, **w)

    x = bn(functional.conv2d(x, weights["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for i in range(blocks):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = bn(functional.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1")
            out = bn(functional.conv2d(out.relu(), weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if f"{name}.shortcut.0.weight" in weights:
                x = bn(functional.conv2d(x, weights[f"{name}.shortcut.0.weight"], stride=stride), f"{name}.shortcut.1")
            elif stride == 2:
                half = x.shape[1] // 2
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
            x = (out + x).relu()
    return functional.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


def renamed(weights, **names):
    return {"".join(_replace(key, names)): value for key, value in weights.items()}


def _replace(key, names):
    for old, new in names.items():
        key = key.replace(f"{old}.", f"{new}.")
    return key


LAYOUTS = {
    "bare": ("B", lambda w: w),
    "chenyaofo": ("B", lambda w: renamed(w, shortcut="downsample")),
    "akamaster": (
        "A",
        lambda w: {
            "best_prec1": 91.7,
            "state_dict": {
                f"module.{k}": v for k, v in renamed(w, fc="linear").items() if not k.endswith("num_batches_tracked")
            },
        },
    ),
    "gal": ("A", lambda w: {"state_dict": w}),
    "repdistiller": ("B", lambda w: {"model": renamed(w, shortcut="downsample"), "epoch": 3, "opt": "sgd"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_checkpoints_load_as_they_are(tmp_path, layout):
    shortcut, pack = LAYOUTS[layout]
    torch.manual_seed(0)
    weights = randomize(model.build("resnet_20", shortcut=shortcut)).state_dict()
    torch.save(pack(weights), tmp_path / "teacher.th")
    teacher = load_teacher(tmp_path / "teacher.th", "resnet_20", 10, CPU)[0]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), plain_resnet(weights, x))
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def save_teacher(path, name="resnet_20", num_classes=10, **edits):
    weights = model.build(name, num_classes).state_dict()
    torch.save({"state_dict": weights | edits}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: save_teacher(p, "resnet_32"), r"as resnet_20 .* unexpected, first layer1\.3\.conv1\.weight"),
        (lambda p: save_teacher(p, num_classes=100), r"fc\.weight is \(100, 64\) in the file, \(10, 64\)"),
        (lambda p: save_teacher(p, **{"conv1.weight": torch.zeros(32, 3, 3, 3)}), r"conv1\.weight is \(32, 3, 3, 3\)"),
        (lambda p: save_teacher(p, **{"fc.bias": torch.full((10,), torch.inf)}), "not finite"),
        (lambda p: exported(p), "holds a resnet_20_sparse, but --teacher_model is resnet_20"),
        (lambda p: training_checkpoint(p), "is a training checkpoint"),
        (lambda p: torch.save({"epoch": 3, "state_dict": {}}, p), "no state dict"),
        (lambda p: torch.save({"weight": 3}, p), "no state dict"),
        (lambda p: torch.save(torch.zeros(3), p), "no state dict"),
        (write_malicious, "cannot be read"),
        (write_truncated, "cannot be read"),
        (write_truncated_legacy, "cannot be read"),
        (lambda p: torch.save({0: torch.zeros(3)}, p), "no state dict"),
        (lambda p: p.write_text("hello"), "cannot be read"),
    ],
)
def test_files_that_are_no_such_teacher_are_refused(tmp_path, write, message):
    write(tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(tmp_path / "teacher.pt", "resnet_20", 10, CPU)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


class Tiny(torch.nn.Module):
    """An architecture of a user's own; `linear` is what public ResNets call something else."""

    num_features = 8

    def __init__(self, num_classes, convs):
        super().__init__()
        self.conv = convs(1)[0](3, 8)
        self.linear = torch.nn.Linear(8, num_classes)

    def forward_features(self, x):
        return self.conv(x)

    def forward_head(self, features):
        return self.linear(features.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("wrap", ["exported", "bare"])
def test_teachers_of_other_architectures_load_under_their_own_names(tmp_path, monkeypatch, wrap):
    monkeypatch.setitem(model.ARCHITECTURES, "tiny", SimpleNamespace(NETWORKS={"tiny": Tiny}))
    monkeypatch.setitem(model._BUILDERS, "tiny", Tiny)
    network = model.build("tiny")
    if wrap == "exported":
        checkpoint.export(tmp_path / "tiny.pt", network, from_plain(Meta, meta("tiny", arch="tiny")))
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "tiny.pt")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(load_teacher(tmp_path, "tiny", 10, CPU)[0](x), network(x))


def test_teacher_dir_may_be_a_file_or_a_folder_that_holds_one(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        find_file(tmp_path / "nowhere", "resnet_20")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_file(tmp_path, "resnet_20")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "one.th").touch()
    assert find_file(tmp_path, "resnet_20") == tmp_path / "one.th"
    assert find_file(tmp_path / "one.th", "resnet_20") == tmp_path / "one.th"
    (tmp_path / "two.pth").touch()
    with pytest.raises(ValueError, match=r"one\.th, two\.pth: name one"):
        find_file(tmp_path, "resnet_20")
    (tmp_path / "resnet_20.pt").touch()
    assert find_file(tmp_path, "resnet_20") == tmp_path / "resnet_20.pt"
