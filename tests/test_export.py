"""Networks to deploy against PyTorch's own, and what people are told of them."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import cv2
import numpy as np
import onnx
import onnx2torch
import onnxruntime
import pytest
import torch
from PIL import Image
from timm.layers import Conv2dSame
from torch import nn

import data
import finetune
import main
from data.loader import Batches
from data.sources import Preprocessing, Split
from model import build, fused
from model.conv import Shift2d
from model.convert import cheapen
from tests.helpers import ROOT, content_of, fail, report_of, run_process, succeed
from tests.helpers import meta as network_meta
from utils import export, options
from utils.checkpoint import load_student
from utils.errors import UserError
from utils.job import Job

PREPROCESSING = asdict(Preprocessing(resize=(18, 18), crop=(16, 16)))
META = network_meta(preprocessing=PREPROCESSING, input_size=[3, 16, 16], mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
BATCH_NORM = torch.ops.aten.batch_norm.default


def randomize(network):
    """Statistics and scales as training leaves them: no two alike."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.2),
                (module.bias, -0.2, 0.2),
            ):
                nn.init.uniform_(tensor, low, high)
    return network.eval()


def answers(network, images, meta=META):
    """The network's logits of images in 0 .. 1, normalized by hand."""
    mean, std = (np.float32(meta[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        return network(torch.from_numpy((images - mean) / std)).numpy()


def pixels(count, size=16):
    return np.random.default_rng(0).random((count, 3, size, size), np.float32)


def padded_as_tensorflow():
    windows = ((3, 2), (5, 3), ((2, 3), (2, 1)))
    layers = (layer for window in windows for layer in (Conv2dSame(20, 20, *window), nn.BatchNorm2d(20)))
    network = nn.Sequential(nn.Conv2d(3, 20, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10))
    cheapen(network, "group", groups=2)
    return network


class Shifts(nn.Sequential):
    """Shifts of every form, each with BatchNorm after it."""

    def __init__(self):
        forms = (
            {"kernel_size": 5, "dilation": 2},
            {"kernel_size": (3, 5), "padding_mode": "reflect"},
            {"kernel_size": 4, "padding": "same"},
            {"kernel_size": 3, "padding": 0, "padding_mode": "circular"},
        )
        layers = [layer for form in forms for layer in (Shift2d(20, **form), nn.BatchNorm2d(20), nn.ReLU())]
        super().__init__(nn.Conv2d(3, 20, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10))


NETWORKS = {
    "depthwise": lambda: build("resnet_20_sparse", 10, "depthwise"),
    "group": lambda: build("resnet_20_sparse", 10, "group", 4),
    "shift": lambda: build("resnet_20_sparse", 10, "shift"),
    "shifts of all forms": Shifts,
    "torchvision": lambda: build("resnet18_sparse", 10, "shift", arch="torchvision"),
    "padding shortcut": lambda: build("resnet_20_sparse", 10, "depthwise", pruned_num=2, shortcut="A"),
    "timm": lambda: build("resnet10t_sparse", 10, "depthwise", arch="timm"),
    "TensorFlow's padding": padded_as_tensorflow,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_onnx_file_computes_what_the_network_does(name, capfd):
    torch.manual_seed(0)
    network = randomize(NETWORKS[name]())
    content = export.to_onnx(export.fold(network, META), META)
    assert capfd.readouterr() == ("", "")
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} | {opset.domain for opset in model.opset_import} == {""}
    assert not model.functions
    assert {"BatchNormalization", "ReduceMean", "Reshape"}.isdisjoint(node.op_type for node in model.graph.node)
    assert model.opset_import[0].version == (19 if "shifts" in name else 14)  # Pad knows "wrap" since 19
    assert str(ROOT).encode() not in content
    session = onnxruntime.InferenceSession(content)
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    for count in (1, 2, 7):
        images = pixels(count)
        (logits,) = session.run(["logits"], {"images": images})
        expected = answers(network, images)
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["TensorFlow's padding", "padding shortcut"])
def test_onnx_files_are_read_by_others(name):
    """OpenCV with batches of changing size, and onnx2torch."""
    torch.manual_seed(0)
    network = randomize(NETWORKS[name]())
    content = export.to_onnx(export.fold(network, META), META)
    reader = cv2.dnn.readNetFromONNX(np.frombuffer(content, np.uint8))
    converted = onnx2torch.convert(onnx.load_from_string(content)).eval()
    for count in (1, 3, 2):
        images = pixels(count)
        expected = answers(network, images)
        reader.setInput(images)
        for logits in (reader.forward(), converted(torch.from_numpy(images)).detach().numpy()):
            np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


class Means(nn.Module):
    """Means over other axes than height and width, and reshapes of more than the batch's images."""

    def forward(self, x):
        rows = x.mean(3).reshape(-1, 16).mean(1).reshape(-1, 3)
        return rows + x.mean((1, 2))[:, :3] + x.mean((2, 3), keepdim=True).reshape(-1, 3) + x.mean((0, 2, 3))


def test_other_means_and_reshapes_keep_their_form():
    graph, images = export.fold(Means(), META), pixels(4)
    content = export.to_onnx(graph, META)
    assert Counter(node.op_type for node in onnx.load_from_string(content).graph.node) > Counter(
        {"GlobalAveragePool": 1, "Flatten": 1, "ReduceMean": 4, "Reshape": 2}
    )
    logits = export.session(content)(images)
    np.testing.assert_allclose(logits, answers(Means(), images), atol=1e-5)


def kernels_in_onnx(name):
    """How often there is a 3 x 3 convolution of so many channels a group, and of which strides, by (group, stride)."""
    model = onnx.load_from_string(export.to_onnx(export.fold(NETWORKS[name](), META), META))
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    found = Counter()
    for node in model.graph.node:
        if node.op_type == "Conv" and weights[node.input[1]][2] == 3:
            (stride,) = (attribute.ints[0] for attribute in node.attribute if attribute.name == "strides")
            found[weights[node.input[1]][1], stride] += 1
    return found


def test_narrow_groups_are_merged_and_strides_stand_where_they_save_most():
    """Of ResNet-20: 16 channels in stage 1 and at the entry of stage 2; all but the stem's 3 have become cheap."""
    # With g = 4, groups of 4 are dense now, those of 8 twice as wide, and those of 16 as they were.
    assert kernels_in_onnx("group") == {(3, 1): 1, (16, 1): 16, (16, 2): 2}
    assert kernels_in_onnx("depthwise") == kernels_in_onnx("shift") == {(3, 1): 1, (1, 1): 16, (1, 2): 2}


def test_an_onnx_file_says_what_it_is():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    meta = META | {"accuracy": {"val": 90.0, "test": None}}
    session = onnxruntime.InferenceSession(export.to_onnx(export.fold(network, meta), meta))
    said = session.get_modelmeta().custom_metadata_map
    assert said["model"] == "resnet_20_sparse"
    for key in ("classes", "accuracy", "input_size", "mean", "std", "pruned_num"):
        assert json.loads(said[key]) == meta[key]
    assert json.loads(said["preprocessing"]) == meta["preprocessing"] | {"resize": [18, 18], "crop": [16, 16]}


def test_a_batch_norm_becomes_part_of_the_convolution_before_it():
    """w' = w * gamma / sqrt(var + eps) and b' = (b - mean) * gamma / sqrt(var + eps) + beta."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, padding="same", bias=True), nn.BatchNorm2d(4, eps=0.1)
    graph = export.fold(randomize(nn.Sequential(conv, norm)), META)
    assert not graph.graph.find_nodes(op="call_function", target=BATCH_NORM)
    weights = dict(graph.named_buffers())
    scale = norm.weight / (norm.running_var + 0.1).sqrt()
    torch.testing.assert_close(weights["folded_0_weight"], (conv.weight * scale[:, None, None, None]).detach())
    torch.testing.assert_close(weights["folded_0_bias"], ((conv.bias - norm.running_mean) * scale + norm.bias).detach())


class NotFoldable(nn.Module):
    """BatchNorms that must stay, after two that need not."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, track_running_stats=i != 3) for i in range(6))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.first = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.norms[0](self.first(x))
        x = self.norms[1](x)  # folded into the same convolution
        y = self.convs[0](x)
        x = self.norms[2](y) + y  # of a convolution that is used twice
        x = x + self.norms[3](self.convs[1](x)).mean()  # by the statistics of the batch
        x = self.norms[4](self.up(x))
        kernel = self.convs[2].weight * 2
        return self.norms[5](nn.functional.conv2d(x, kernel)).mean((2, 3))  # of weights that are computed


def test_batch_norms_that_cannot_be_folded_stay():
    torch.manual_seed(0)
    network = randomize(NotFoldable())
    graph = export.fold(network, META)
    assert len(graph.graph.find_nodes(op="call_function", target=BATCH_NORM)) == 4
    images = pixels(3)
    with torch.no_grad():
        np.testing.assert_allclose(graph(torch.from_numpy(images)), answers(network, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", ["depthwise", "group"])
def test_kernels_take_no_part_in_an_export(conv):
    network = randomize(build("resnet_20_sparse", 10, conv))
    plain = export.fold(network, META)
    fused.enable()
    try:
        graph = export.fold(network, META)
    finally:
        fused.disable()
    assert all(node.target.namespace == "aten" for node in graph.graph.nodes if hasattr(node.target, "namespace"))
    assert [str(node.target) for node in graph.graph.nodes] == [str(node.target) for node in plain.graph.nodes]


def test_files_for_pytorch_load_without_this_project():
    torch.manual_seed(0)
    network, images = randomize(build("resnet_20_sparse", 10, "shift", pruned_num=2)), pixels(5)
    graph, expected = export.fold(network, META), answers(network, images)
    loaded = {
        "torchscript": torch.jit.load(io.BytesIO(export.to_torchscript(graph, META))),
        "pt2": torch.export.load(io.BytesIO(export.to_pt2(graph, META))).module(),
    }
    operators = {str(node.target) for node in torch.export.load(io.BytesIO(export.to_pt2(graph, META))).graph.nodes}
    assert "aten.convolution.default" in operators  # of the core set, to which runtimes of PyTorch's programs keep
    assert not {"aten.conv2d.default", "aten.linear.default"} & operators
    for function in loaded.values():
        for count in (1, 5):
            with torch.no_grad():
                logits = function(torch.from_numpy(images[:count])).numpy()
            np.testing.assert_allclose(logits, expected[:count], atol=1e-5 * np.abs(expected).max())


class Mean(nn.Module):
    """The means of the channels, scaled, as logits."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x.mean((2, 3))


def batches(meta, count=5, batch_size=2):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    split = Split(images, np.zeros(count, np.int64))
    return Batches(split, batch_size, meta["mean"], meta["std"], torch.device("cpu"))


def test_agreement_is_of_pixels_as_they_were_and_finds_what_differs():
    def same(images):
        assert np.array_equal((images * 255).round() / np.float32(255), images)
        return answers(Mean(), images)

    assert export.compare(same, Mean(), META, batches(META)).holds
    other = export.compare(lambda images: same(images)[:, ::-1].copy(), Mean(), META, batches(META))
    assert (other.images, other.holds) == (5, False)
    assert 0 < other.differing <= 5
    far = export.compare(lambda images: same(images) + np.float32(0.25), Mean(), META, batches(META))
    assert (far.differing, far.holds) == (0, False)
    assert far.difference == pytest.approx(0.25, rel=1e-4)
    alone = export.compare(lambda images: same(images) + np.float32(len(images) == 1), Mean(), META, batches(META))
    assert not alone.holds
    for error, holds in ((0.01, True), (1.0, False)):  # of logits in the thousands
        large = export.compare(lambda images: 1e4 * same(images) + np.float32(error), Mean(1e4), META, batches(META))  # noqa: B023
        assert (large.holds, large.largest > 1e3) == (holds, True)
    assert export.Agreement(images=5, differing=1, difference=1e-6, largest=1.0).holds  # a tie
    none = export.compare(lambda images: same(images) * np.float32("nan"), Mean(), META, batches(META))
    assert not none.holds
    deployment = export.Deployment(onnx=b"", agreement=none)
    assert deployment.notes() == []
    assert "before relying on it" in deployment.doubts()[0]
    assert json.dumps(deployment.as_json(), allow_nan=False)


class Fickle(Mean):
    """Computes differently for different images."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_a_network_that_cannot_be_exported_is_told_in_one_line(tmp_path):
    deployment = export.write(tmp_path / "a.pt", Fickle(), META, ["onnx", "pt2"], batches(META))
    assert deployment.files == []
    (failure,) = deployment.failures
    assert failure.startswith("not exported as onnx, pt2: ")
    assert "\n" not in failure
    assert list(tmp_path.iterdir()) == []


def test_reset_deletes_exported_files(tmp_path):
    marks = {"job_dir": "", "teacher_model": "", "lambda": 0, "miu": 0}
    config = {"arch": "resnet", "pruned_num": 5, "pretrain": False, **marks}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pruned_num": 7}))
    for number in (5, 7):
        (tmp_path / f"resnet_pruned_{number}.onnx").touch()
    job = Job(tmp_path, config)
    assert job.checkpoint_to_resume(None, True, []) is None
    job.open(None, 0, reset=True)
    job.close()
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.slow
def test_missing_packages_are_named_before_anything_is_written(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "onnxscript.py").write_text("raise ImportError(\"No module named 'onnxscript'\")")
    flags = ("--dataset", "digits", "--teacher_model", "resnet_20", "--export", "onnx", "--job_dir", tmp_path / "job")
    error = fail("main.py", *flags, run=run_process, PYTHONPATH=str(tmp_path / "packages"))
    assert "pip install onnx onnxscript onnxruntime" in error
    assert not (tmp_path / "job").exists()


@pytest.mark.slow
def test_main_does_not_export_what_it_only_tests(tmp_path):
    assert "finetune.py --refine" in fail("main.py", "--test_only", "--export", "onnx", "--job_dir", tmp_path / "job")


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """The folder with a student in all formats, from a file of an older version, and what was printed."""
    folder = tmp_path_factory.mktemp("exported") / "new" / "job"
    content = content_of(runs.student_file)
    del content["meta"]["preprocessing"]
    torch.save(content, folder.parents[1] / "older.pt")
    flags = ("--refine", folder.parents[1] / "older.pt", "--pruned", "--test_only")
    flags += ("--export", "onnx", "torchscript", "pt2")
    return folder, succeed("finetune.py", *flags, "--job_dir", folder)


@pytest.mark.slow
def test_an_exported_student_is_deployed_without_training(runs, exported):
    folder, output = exported
    files = {path.suffix: path for path in folder.iterdir()}
    assert {path.name for path in files.values()} == {f"resnet_pruned_18.{form}" for form in export.WRITERS}
    assert "the class that PyTorch finds for each of 360 test images" in output
    network, meta = load_student(runs.student_file)
    images = data.load("digits", None, 0).test.images.transpose(0, 3, 1, 2) / np.float32(255)
    expected = answers(network, images, meta)
    inputs = torch.from_numpy(images)
    with torch.no_grad():
        logits = {
            ".torchscript": torch.jit.load(files[".torchscript"])(inputs).numpy(),
            ".pt2": torch.export.load(files[".pt2"]).module()(inputs).numpy(),
            ".onnx": onnxruntime.InferenceSession(files[".onnx"]).run(["logits"], {"images": images})[0],
        }
    for values in logits.values():
        np.testing.assert_allclose(values, expected, atol=1e-4)
        assert np.array_equal(values.argmax(1), expected.argmax(1))


@pytest.mark.slow
def test_an_onnx_file_and_a_copy_of_classify_are_all_it_takes_to_classify(runs, exported, tmp_path):
    """The file's student is of an older version, whose own file says nothing of preprocessing."""
    for name in ("torch", "torchvision", "tqdm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    shutil.copy(ROOT / "experiment" / "classify.py", tmp_path)
    shutil.copy(exported[0] / "resnet_pruned_18.onnx", tmp_path)
    images = data.load("digits", None, 0).test.images
    paths = [f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(tmp_path / path)
    command = [sys.executable, "classify.py", "resnet_pruned_18.onnx", *paths]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    network, meta = load_student(runs.student_file)
    logits = answers(network, images.transpose(0, 3, 1, 2) / np.float32(255), meta)
    assert result.stdout.splitlines() == [
        f"{path} {meta['classes'][i]}" for path, i in zip(paths, logits.argmax(1), strict=True)
    ]
    assert result.stderr == ""


FILE = """
from torch import nn

class Net(nn.Module):
    num_features = 8

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward_features(self, x):
        return self.conv(self.stem(x))

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

class Fickle(Net):
    def forward_features(self, x):
        return super().forward_features(x if x.device.type == "meta" or x.sum() > 0 else -x)
"""


@pytest.mark.slow
def test_the_report_of_a_run_compares_both_runtimes(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    flags = ("--dataset", "digits", "--arch", tmp_path / "net.py", "--num_epochs", 1, "--num_students", 1)
    job = tmp_path / "job"
    output = succeed("main.py", *flags, "--teacher_model", "Net", "--export", "onnx", "--job_dir", job)
    lines = output.splitlines()
    assert lines[-1] == f"exported {job / 'net_pruned_1.pt'}; more in {job / 'report.md'}"
    assert f"also exported {job / 'net_pruned_1.onnx'}" in lines
    report = report_of(job)
    assert report["summary"] in lines
    assert re.search(r"\(PyTorch(, unsteady)?\), .* \(ONNX Runtime(, unsteady)?\); ", report["summary"])
    assert (job / "report.md").read_text().splitlines()[2] == report["summary"]
    standard, student = report["networks"][:2]
    assert student["file_bytes"] == (job / "net_pruned_1.pt").stat().st_size
    assert student["onnx_bytes"] == (job / "net_pruned_1.onnx").stat().st_size
    for key in ("onnx_latency_1", "onnx_latency_256", "file_bytes", "onnx_bytes"):
        assert student["ratios"][key] == pytest.approx(standard[key] / student[key])
    assert report["exported"]["files"] == ["net_pruned_1.onnx"]
    agreement = report["exported"]["agreement"]
    assert (agreement["images"], agreement["differing"]) == (360, 0)
    assert agreement["difference"] < 1e-4


@pytest.mark.slow
def test_a_run_survives_a_network_that_cannot_be_exported(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    flags = ("--dataset", "digits", "--arch", tmp_path / "net.py", "--num_epochs", 1, "--num_students", 1)
    job = tmp_path / "job"
    output = succeed("main.py", *flags, "--teacher_model", "Fickle", "--export", "pt2", "--job_dir", job)
    assert "Failed: not exported as pt2: " in output
    assert output.splitlines()[-1].startswith(f"exported {job / 'net_pruned_1.pt'}")
    assert any("not exported as pt2" in note for note in report_of(job)["notes"])
    flags = ("--refine", job / "net_pruned_1.pt", "--pruned", "--arch", tmp_path / "net.py", "--test_only")
    assert "not exported as pt2" in fail("finetune.py", *flags, "--export", "pt2", "--job_dir", tmp_path / "other")


@pytest.mark.parametrize("method", ["od", "one"])
def test_the_online_teacher_is_a_network_of_its_own(tmp_path, method, capsys):
    """Its file gives the test accuracy of the report, is evaluated and exported like a student, and is not refined."""
    flags = ("--dataset", "digits", "--train_size", 200, "--teacher_model", "resnet_20", "--compile", "off")
    job, other = tmp_path / "job", tmp_path / "other"
    flags = (*flags, "--num_epochs", 1, "--num_students", 2, "--method", method, "--export_teacher", "--job_dir", job)
    main.main(options.parse("main", list(map(str, flags))))
    file = job / "resnet_teacher_18.pt"
    network, meta = load_student(file)
    assert meta["ensemble"] == {"method": method, "num_students": 2}
    (row,) = (row for row in report_of(job)["networks"] if row["role"] == "online_teacher")
    assert meta["accuracy"] == {"val": row["val"], "test": row["test"]}
    assert sum(parameter.numel() for parameter in network.parameters()) == row["params"]
    assert network(torch.zeros(3, 3, 8, 8)).shape == (3, 10)

    capsys.readouterr()
    refine = ("--refine", file, "--pruned", "--compile", "off", "--job_dir", other)
    finetune.main(options.parse("finetune", list(map(str, (*refine, "--test_only", "--export", "onnx")))))
    output = capsys.readouterr().out
    assert f"{row['test']:.2f} % on the test set" in output
    assert "the class that PyTorch finds for each of 360" in output
    assert [path.name for path in other.iterdir()] == ["resnet_teacher_18.onnx"]
    with pytest.raises(UserError, match="give --test_only"):
        finetune.main(options.parse("finetune", list(map(str, refine))))


def test_only_a_run_with_an_online_teacher_exports_it(capsys):
    for flags in (["--pretrain"], ["--method", "dml"], ["--num_students", "1", "--lambda", "0"]):
        with pytest.raises(SystemExit):
            options.parse("main", ["--export_teacher", *flags])
        assert "this run has none" in capsys.readouterr().err
