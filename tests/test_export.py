"""Networks to deploy against PyTorch's own, and what people are told of them."""

import io
import json
from collections import Counter
from dataclasses import asdict

import cv2
import numpy as np
import onnx
import onnx2torch
import onnxruntime
import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from data.loader import Batches
from data.sources import Preprocessing, Split
from model import build, fused
from model.conv import Shift2d
from model.convert import cheapen
from tests.helpers import ROOT, answers
from tests.helpers import meta as network_meta
from utils import export
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
        expected = answers(network, images, META)
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
        expected = answers(network, images, META)
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
    np.testing.assert_allclose(logits, answers(Means(), images, META), atol=1e-5)


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
        np.testing.assert_allclose(
            graph(torch.from_numpy(images)), answers(network, images, META), rtol=1e-4, atol=1e-5
        )


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
    graph, expected = export.fold(network, META), answers(network, images, META)
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
        return answers(Mean(), images, META)

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
