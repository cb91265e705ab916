"""Exported files at the end of a run, from a student's file, and of the online teacher."""

import re
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import data
import finetune
import main
from tests.helpers import ROOT, answers, content_of, fail, report_of, run_process, succeed
from utils import export, options
from utils.checkpoint import load_student
from utils.errors import UserError


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


def exporting_run(tmp_path, network, form):
    """What a run of one student of a network of FILE prints, and its job_dir."""
    (tmp_path / "net.py").write_text(FILE)
    flags = ("--dataset", "digits", "--arch", tmp_path / "net.py", "--num_epochs", 1, "--num_students", 1)
    job = tmp_path / "job"
    return succeed("main.py", *flags, "--teacher_model", network, "--export", form, "--job_dir", job), job


@pytest.mark.slow
def test_the_report_of_a_run_compares_both_runtimes(tmp_path):
    output, job = exporting_run(tmp_path, "Net", "onnx")
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
    output, job = exporting_run(tmp_path, "Fickle", "pt2")
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
