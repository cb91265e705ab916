"""Thousands of damaged and forged files of weights: each loads as it was written, or is refused in one line."""

import copy
import random
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch

import model
from tests.helpers import BUDGET, content_of
from tests.test_checkpoint import exported, training_checkpoint
from utils import checkpoint, options
from utils.checkpoint import best_student, load_network, load_student
from utils.device import Execution
from utils.engine import Trainer
from utils.errors import UserError
from utils.metrics import Best, ByNetwork, Scores
from utils.teacher import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def little_memory():
    """Half a gigabyte more than the process has already."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An exported student, an exported teacher, a training checkpoint and a public checkpoint, each with its reader."""
    folder = tmp_path_factory.mktemp("files")
    exported(folder / "student.pt")
    exported(folder / "teacher.pt", model="resnet_20")
    training_checkpoint(folder / "last.pt", accuracies=(50.0,))
    torch.manual_seed(0)
    torch.save({"net": model.build("resnet_20").state_dict(), "acc": 90.0}, folder / "public.pt")
    return folder


def read_teacher(path):
    return load_teacher(path, "resnet_20", 10, CPU)[0]


READERS = {
    "student.pt": lambda path: load_student(path)[0],
    "last.pt": lambda path: best_student(path)[0],
    "teacher.pt": read_teacher,
    "public.pt": read_teacher,
}


def outcome(read, path):
    """The weights that a reader makes of a file; None if it refuses it. Nothing else may happen."""
    try:
        return read(path).state_dict()
    except UserError as error:
        refusal = cause = error
    assert path.name in str(refusal)
    while cause := cause.__cause__ or cause.__context__:
        assert not isinstance(cause, MemoryError)
        assert "allocate" not in str(cause)
    return None


def same(weights, expected):
    return all(torch.equal(weights[key], value) for key, value in expected.items())


def damage(content, generator):
    """One of the things that disks, networks and editors do to a file."""
    kind = generator.randrange(6)
    start = generator.randrange(len(content))
    length = generator.choice((1, 2, 8, 100, 5000))
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + bytes([content[start] ^ 1 << generator.randrange(8)]) + content[start + 1 :]
    if kind == 2:
        return content[:start] + generator.randbytes(length) + content[start:]
    if kind == 3:
        return content[:start] + content[start + length :]
    if kind == 4:
        return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]
    return content[:start] + generator.randbytes(min(length, len(content) - start)) + content[start + length :]


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_load_as_they_were(files, tmp_path, name):
    """Half of the damage is to where the structure of the archive is: its beginning and its end."""
    generator, original = random.Random(name), (files / name).read_bytes()
    expected, refused = READERS[name](files / name).state_dict(), 0
    path = tmp_path / "damaged.pt"
    count = int(120 * BUDGET)
    for i in range(count):
        if i % 2:
            content = damage(original, generator)
        elif i % 4:
            content = original[:-12000] + damage(original[-12000:], generator)
        else:
            content = damage(original[:20000], generator) + original[20000:]
        path.write_bytes(content)
        weights = outcome(READERS[name], path)
        assert weights is None or same(weights, expected)
        refused += weights is None
    assert refused > 0.75 * count


HUGE = torch.zeros(1).expand(10**6, 10**6)
ODD = [
    None, True, -1, 0, 3, 10**9, 10**400, -2.5, 1e308, float("nan"), float("inf"), "", "depthwise", "../../etc/passwd",
    "evil.py", "timm", "x\0y", "\ud800", "a" * 5000, b"bytes", [], [0], [[0.5] * 3], ["a"] * 10, {}, {"stem": 3},
    {"hidden": 10**9}, {"num_classes": 3}, {1: 2}, set(), 1j, torch.zeros(3), torch.tensor(torch.nan),
    torch.zeros(10, 64, dtype=torch.complex64), torch.zeros(2, 2).to_sparse(), torch.empty(10**6, 10**6, device="meta"),
    HUGE, torch.Size([3]), torch.float32,
]  # fmt: skip


def places(content, path=()):
    """Every place in nested dictionaries and lists."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def put(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is put:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(("name", "count"), {"student.pt": 100, "teacher.pt": 30, "last.pt": 80}.items())
def test_forged_files_are_refused_or_load_with_their_own_weights(files, tmp_path, name, count):
    """A file that is whole, but says something else somewhere; mostly in what describes the network."""
    generator, original = random.Random(name), content_of(files / name)
    everywhere = list(places(original))
    telling = [path for path in everywhere if path[0] not in ("state_dict", "model")]
    path = tmp_path / "forged.pt"
    for i in range(int(count * BUDGET)):
        content = copy.deepcopy(original)
        put(content, generator.choice(telling if i % 4 else everywhere), generator.choice([put, *ODD]))
        torch.save(content, path)
        weights = outcome(READERS[name], path)
        if weights is not None:
            held, prefix = (content["model"], "students.0.") if name == "last.pt" else (content["state_dict"], "")
            own = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
            assert same(weights, own)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def storage():
    return torch.zeros(4)._typed_storage()


@pytest.mark.parametrize(
    "value",
    [
        Call(bytearray, 10**10),
        Call(torch._utils._rebuild_tensor_v2, storage(), 0, (10**10,), (1,), False, {}),
        Call(torch._utils._rebuild_tensor_v2, storage(), 0, (10, 64), (0, 0), False, {}),
        Call(torch._utils._rebuild_tensor_v2, storage(), 10**12, (1,), (1,), False, {}),
        Call(torch._utils._rebuild_tensor_v2, storage(), 0, (-1,), (1,), False, {}),
    ],
    ids=["bytearray", "larger than its memory", "one number over and over", "beyond its memory", "negative"],
)
@pytest.mark.parametrize("name", READERS)
def test_tensors_that_would_not_fit_the_memory_are_refused(files, tmp_path, name, value):
    content = torch.load(files / name, weights_only=True)
    weights = next(content[key] for key in ("state_dict", "model", "net") if key in content)
    weights[next(key for key in weights if key.endswith("fc.weight"))] = value
    torch.save(content, tmp_path / "forged.pt")
    assert outcome(READERS[name], tmp_path / "forged.pt") is None


@pytest.mark.parametrize(
    ("arch", "name", "build"),
    [("timm", "vit_giant_patch14_224", {}), ("vgg", "vgg_16_bn", {"classifier": "mlp", "hidden": 10**6})],
)
def test_a_small_file_cannot_ask_for_a_huge_network(files, tmp_path, arch, name, build):
    content = content_of(files / "teacher.pt")
    content["meta"] |= {"arch": arch, "model": name, "build": build}
    torch.save(content, tmp_path / "forged.pt")
    with pytest.raises(UserError, match="does not match"):
        load_student(tmp_path / "forged.pt")


def test_archives_that_unpack_to_more_than_they_are_are_refused(tmp_path):
    import zipfile

    torch.save({"weight": torch.zeros(10**7)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "bomb.pt")


# --- training checkpoints that are resumed

FLAGS = ("--dataset", "digits", "--teacher_model", "resnet_20", "--num_students", "1", "--num_epochs", "1")


class Bias(torch.nn.Module):
    """A network of a single vector."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(10))

    def forward_features(self, x):
        return x

    def forward_head(self, features):
        return features.mean((1, 2, 3), keepdim=True)[:, 0, 0] + self.bias

    def forward(self, x):
        return self.forward_head(x)


def trainer():
    return Trainer(model.online.OnlineTeacher([Bias()], 10), None, options.parse("main", FLAGS), CPU, Execution())


@pytest.fixture(scope="module")
def resumable(tmp_path_factory):
    """A training checkpoint after one step, and its metadata."""
    folder = tmp_path_factory.mktemp("checkpoint")
    started = trainer()
    started.epoch, started.best = 1, Best(epoch=1, student=0, accuracy=10.0, loss=2.0)
    started.train_step(torch.randn(4, 3, 2, 2), torch.arange(4))
    started.scores = Scores(accuracy=ByNetwork([10.0], 9.0), loss=ByNetwork([2.0]))
    exported(folder / "student.pt")
    _, meta = load_network(folder / "student.pt")
    meta = replace(meta, config=options.parse("main", FLAGS).recorded())
    for name in ("last.pt", "model_best.pt"):
        checkpoint.save(folder / name, started._state(meta))
    return folder, meta


def step(resumed):
    losses, *_ = resumed.train_step(torch.randn(4, 3, 2, 2), torch.arange(4))
    return losses["loss"].item()


def test_forged_checkpoints_are_refused_or_resumed(resumable, tmp_path):
    """A run that goes on can take a step, knows its best student and its epoch, and has finite numbers only."""
    folder, meta = resumable
    generator, original = random.Random(0), content_of(folder / "last.pt")
    everywhere = list(places(original))
    for name in ("last.pt", "model_best.pt"):
        torch.save(original, tmp_path / name)
    accepted, count = 0, int(150 * BUDGET)
    for i in range(count):
        name = ("last.pt", "model_best.pt")[i % 5 == 0]
        content = copy.deepcopy(original)
        where = [path for path in everywhere if path[0] == "optimizer"] if i % 3 == 0 else everywhere
        put(content, generator.choice(where), generator.choice([put, *ODD]))
        torch.save(content, tmp_path / name)
        resumed = trainer()
        try:
            resumed.resume(tmp_path / "last.pt", meta)
        except UserError:
            continue
        finally:
            torch.save(original, tmp_path / name)
        accepted += 1
        assert np.isfinite(step(resumed))
        assert resumed.best_student is resumed.learner.students[0]
        assert resumed.best.accuracy <= 1e300
        assert 0 <= resumed.epoch < 2**31
    assert 0 < accepted < 0.8 * count


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(11), r"momentum does not match: 0 is \(11,\) in the file, \(10,\) in the network"),
        (torch.full((10,), torch.inf), "not finite"),
        (torch.zeros(10, dtype=torch.long), "whole"),
    ],
)
def test_momentum_of_another_network_is_refused(resumable, tmp_path, buffer, message):
    folder, meta = resumable
    content = content_of(folder / "last.pt")
    content["optimizer"]["state"][0]["momentum_buffer"] = buffer
    for name in ("last.pt", "model_best.pt"):
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        trainer().resume(tmp_path / "last.pt", meta)


def test_resumed_momentum_is_what_it_was(resumable):
    folder, meta = resumable
    resumed = trainer()
    resumed.resume(folder / "last.pt", meta)
    saved = content_of(folder / "last.pt")["optimizer"]["state"]
    assert len(saved) == len(list(resumed.learner.parameters()))
    for i, parameter in enumerate(resumed.learner.parameters()):
        assert torch.equal(resumed.optimizer.state[parameter]["momentum_buffer"], saved[i]["momentum_buffer"])
