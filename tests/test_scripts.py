"""main.py and finetune.py from start to end, as their users run them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import main
from tests.helpers import ROOT, content_of, fail, make_tree, report_of, run_process, succeed, tensorboard_scalars
from utils import options
from utils.checkpoint import load_student
from utils.cost import count
from utils.errors import UserError

pytestmark = pytest.mark.slow

JOB_FILES = {
    "config.json",
    "logger.log",
    "metrics.jsonl",
    "run",
    "checkpoint",
    "report.md",
    "report.json",
    "curves.png",
}


def row(report, name):
    return next(entry for entry in report["networks"] if entry["name"] == name)


@pytest.mark.parametrize(
    ("job", "exported"),
    [("teacher", "resnet_20.pt"), ("students", "resnet_pruned_18.pt"), ("refined", "resnet_pruned_18.pt")],
)
def test_job_dir_holds_the_documented_files(runs, job, exported):
    folder = getattr(runs, job)
    assert {path.name for path in folder.iterdir()} == JOB_FILES | {exported}
    assert {path.name for path in (folder / "checkpoint").iterdir()} == {"last.pt", "model_best.pt"}
    for phase in ("train", "test"):
        assert len(list((folder / "run" / phase).iterdir())) == 1
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert runs.output[job].splitlines()[-1] == f"exported {folder / exported}; more in {folder / 'report.md'}"


def test_metrics_hold_one_line_an_epoch(runs):
    lines = [json.loads(line) for line in (runs.students / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["lr"] for line in lines] == pytest.approx([0.05, 0.005, 0.0005])
    for line in lines:
        assert set(line["train"]["loss"]) == {"total", "ce_students", "ce_teacher", "kl_online", "kl_pretrained"}
        for part in ("train", "val"):
            assert len(line[part]["accuracy"]["students"]) == 2
            assert 0 <= line[part]["accuracy"]["online_teacher"] <= 100


def test_tensorboard_shows_every_loss_accuracy_and_the_learning_rate(runs):
    lines = [json.loads(line) for line in (runs.students / "metrics.jsonl").read_text().splitlines()]
    train, test = (tensorboard_scalars(runs.students / "run" / phase) for phase in ("train", "test"))
    assert train["lr"] == pytest.approx({line["epoch"]: line["lr"] for line in lines})
    for name in lines[0]["train"]["loss"]:
        assert train[f"loss/{name}"] == pytest.approx({line["epoch"]: line["train"]["loss"][name] for line in lines})
    for scalars, part in ((train, "train"), (test, "val")):
        for i in (0, 1):
            expected = {line["epoch"]: line[part]["accuracy"]["students"][i] for line in lines}
            assert scalars[f"accuracy/student_{i + 1}"] == pytest.approx(expected)
        expected = {line["epoch"]: line[part]["accuracy"]["online_teacher"] for line in lines}
        assert scalars["accuracy/online_teacher"] == pytest.approx(expected)


def test_report_states_costs_and_ratios(runs):
    report = report_of(runs.students)
    names = [entry["name"] for entry in report["networks"]]
    best = report["best"]["student"]
    students = ["student 1", "student 2"]
    students[best] += ", best"
    assert names == ["resnet_20, standard", *students, "online teacher"]
    standard, student = report["networks"][0], row(report, students[best])
    network, _ = load_student(runs.student_file)
    assert (student["params"], student["macs"]) == tuple(count(network, (3, 8, 8)))
    for key in ("params", "macs", "latency_1", "latency_256"):
        assert student["ratios"][key] == pytest.approx(standard[key] / student[key])
    assert "validation images; the test set was evaluated once" in (runs.students / "report.md").read_text()


def plain_accuracy(path):
    """Test accuracy of an exported student on the digits, by code that shares nothing with the training."""
    network, meta = load_student(path)
    test = data.load("digits", None, 0.1).test
    mean, std = np.float32(meta["mean"]), np.float32(meta["std"])
    images = torch.from_numpy(((test.images / np.float32(255)) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        predictions = torch.cat([network(part).argmax(1) for part in images.split(90)])
    return 100 * np.mean(predictions.numpy() == test.targets)


@pytest.mark.parametrize(("job", "name"), [("students", ", best"), ("refined", "student, refined")])
def test_exported_student_has_the_accuracy_that_the_report_states(runs, job, name):
    folder = getattr(runs, job)
    stated = next(entry for entry in report_of(folder)["networks"] if name in entry["name"])["test"]
    assert plain_accuracy(folder / "resnet_pruned_18.pt") == pytest.approx(stated, abs=1e-9)
    _, meta = load_student(folder / "resnet_pruned_18.pt")
    assert meta["accuracy"]["test"] == stated
    assert stated > 30  # a student that learned nothing would make the comparison empty


def test_exported_student_describes_itself(runs):
    content = torch.load(runs.student_file, weights_only=True)
    meta = content["meta"]
    expected = {"arch": "resnet", "model": "resnet_20_sparse", "conv": "depthwise", "groups": 4, "pruned_num": 18}
    expected |= {"num_classes": 10, "classes": [str(i) for i in range(10)], "input_size": [3, 8, 8]}
    expected["preprocessing"] = {
        "resize": (8, 8), "crop": (8, 8), "interpolation": "bilinear", "antialias": True, "decoder": "pillow",
        "filter": "pillow", "background": "white",
    }  # fmt: skip
    assert {key: meta[key] for key in expected} == expected
    assert len(meta["mean"]) == len(meta["std"]) == 3
    assert meta["config"] == json.loads((runs.students / "config.json").read_text())
    assert meta["config"]["lambda"] == 0.1
    assert {value.dtype for value in content["state_dict"].values()} == {torch.float32, torch.int64}


def test_exported_student_is_the_best_of_the_best_epoch(runs):
    content = content_of(runs.students / "checkpoint" / "model_best.pt")
    accuracies = [
        max(json.loads(line)["val"]["accuracy"]["students"])
        for line in (runs.students / "metrics.jsonl").read_text().splitlines()
    ]
    assert content["best"]["accuracy"] == max(accuracies)
    weights = torch.load(runs.student_file, weights_only=True)["state_dict"]
    prefix = f"students.{content['best']['student']}."
    assert all(torch.equal(value, content["model"][prefix + key]) for key, value in weights.items())


def test_refinement_reports_before_and_after_and_keeps_the_better(runs):
    report = report_of(runs.refined)
    before, after = row(report, "student, before"), row(report, "student, refined")
    assert after["val"] >= before["val"]
    original = report_of(runs.students)
    best = next(entry for entry in original["networks"] if entry["name"].endswith("best"))
    assert (before["val"], before["test"]) == (best["val"], best["test"])
    for name in ("resnet_20, standard", "online teacher"):
        assert row(report, name)["test"] == row(original, name)["test"]


def test_refined_student_keeps_the_configuration_of_its_training(runs):
    _, trained = load_student(runs.student_file)
    _, refined = load_student(runs.refined / "resnet_pruned_18.pt")
    assert refined["history"] == [trained["config"]]
    assert refined["config"]["lr"] == 0.01


def test_refinement_that_only_harms_exports_the_student_as_it_was(runs, tmp_path):
    succeed("finetune.py", *runs.refine_flags[:3], "--num_epochs", 1, "--lr", 3, "--job_dir", tmp_path / "worse")
    old, new = (
        torch.load(f / "resnet_pruned_18.pt", weights_only=True)["state_dict"]
        for f in (runs.students, tmp_path / "worse")
    )
    assert all(torch.equal(value, new[key]) for key, value in old.items())
    assert report_of(tmp_path / "worse")["best"]["epoch"] == 0


def test_finetune_takes_the_best_student_out_of_a_training_checkpoint(runs, tmp_path):
    flags = ("--refine", runs.students / "checkpoint" / "model_best.pt", *runs.refine_flags[3:])
    succeed("finetune.py", *flags, "--job_dir", tmp_path / "job", run=run_process)
    assert (tmp_path / "job" / "metrics.jsonl").read_text() == (runs.refined / "metrics.jsonl").read_text()


def test_test_only_prints_accuracies_and_writes_nothing(runs, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in runs.folder.rglob("*"))
    output = succeed("main.py", *runs.student_flags, "--test_only", "--job_dir", runs.students)
    report = report_of(runs.students)
    for entry, line in zip(report["networks"], output.splitlines(), strict=True):
        assert f"{entry['test']:.2f} %" in line
    output = succeed("finetune.py", *runs.refine_flags[:3], "--test_only", "--job_dir", tmp_path / "none")
    assert f"{row(report_of(runs.refined), 'student, before')['test']:.2f} %" in output
    assert sorted((p, p.stat().st_mtime_ns) for p in runs.folder.rglob("*")) == before
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "exported"),
    [
        (("--conv", "shift", "--num_students", 3, "--pruned_num", 7), "resnet_pruned_7.pt"),
        (("--conv", "group", "--groups", 8, "--num_students", 1), "resnet_pruned_18.pt"),
        (("--pruned_num", 0, "--num_students", 2, "--kl_reduction", "element"), "resnet_pruned_0.pt"),
        (("--num_students", 1, "--lambda", 0, "--val_size", 0, "--scheduler", "cosine"), "resnet_pruned_18.pt"),
        (("--student_model", "resnet_32", "--num_students", 1, "--precision", "bf16"), "resnet_pruned_0.pt"),
    ],
)
def test_teacher_free_variants_run_and_can_be_refined(tmp_path, flags, exported):
    base = ("--dataset", "digits", "--teacher_model", "resnet_20", "--num_epochs", 1)
    succeed("main.py", *base, *flags, "--job_dir", tmp_path / "job")
    report = report_of(tmp_path / "job")
    assert report["networks"][0]["test"] is None  # no pretrained teacher, no accuracy
    if "--val_size" in flags:
        assert "on the TEST set" in (tmp_path / "job" / "report.md").read_text()
        assert {entry["name"] for entry in report["networks"]} == {"resnet_20, standard", "student 1, best"}
    file = tmp_path / "job" / exported
    succeed("finetune.py", "--refine", file, "--pruned", "--num_epochs", 1, "--job_dir", tmp_path / "refined")
    assert (tmp_path / "refined" / exported).is_file()


def test_offline_distillation_is_one_student_without_the_online_term(runs, tmp_path):
    flags = (*runs.student_flags, "--num_students", 1, "--lambda", 0, "--num_epochs", 1)
    succeed("main.py", *flags, "--job_dir", tmp_path / "kd")
    line = json.loads((tmp_path / "kd" / "metrics.jsonl").read_text())
    assert set(line["train"]["loss"]) == {"total", "ce_students", "kl_pretrained"}
    assert "online_teacher" not in line["val"]["accuracy"]


def test_refinement_on_other_data_reports_that_data_alone(runs, tmp_path):
    """The same classes at twice the size: accuracies and costs from the digits would not belong in the table."""
    digits = data.load("digits", None, 0)
    for split, name in ((digits.train, "train"), (digits.test, "test")):
        for i in range(80):
            path = tmp_path / "set" / name / str(split.targets[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[i]).resize((16, 16)).save(path)
    flags = ("--dataset", "folder", "--data_dir", tmp_path / "set", "--job_dir", tmp_path / "job")
    succeed("finetune.py", *runs.refine_flags, *flags)
    report = report_of(tmp_path / "job")
    assert [e["name"] for e in report["networks"]] == ["resnet_20, standard", "student, before", "student, refined"]
    assert report["networks"][0]["test"] is None
    assert report["meta"]["input_size"] == [3, 16, 16]


def test_loss_that_explodes_ends_in_one_line(tmp_path):
    flags = (
        "--dataset",
        "digits",
        "--teacher_model",
        "resnet_20",
        "--lr",
        1e30,
        "--print_freq",
        2,
        "--warmup_epochs",
        0,
    )
    error = fail("main.py", *flags, "--num_epochs", 2, "--job_dir", tmp_path / "job")
    assert "the loss is not finite in epoch 1, step" in error
    assert "learning rate 1e+30" in error


def test_help_answers_without_importing_torch():
    result = run_process("main.py", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    assert "--lambda" in result.stdout
    assert "numpy" not in result.stderr
    assert "torch" not in result.stderr


def test_works_from_another_folder(runs, tmp_path):
    flags = ("--dataset", "digits", "--teacher_model", "resnet_20", "--num_epochs", 1, "--num_students", 1)
    succeed("main.py", *flags, "--job_dir", "relative job/", run=run_process, cwd=tmp_path)
    assert (tmp_path / "relative job" / "report.md").is_file()
    assert not (ROOT / "relative job").exists()


def accuracies_of(capsys, *flags):
    """What main.py --test_only prints, as {name: accuracy}."""
    main.main(options.parse("main", ["--test_only", *map(str, flags)]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("on the test set")]
    return {name: float(rest.split()[0]) for name, rest in (line.split(": ") for line in lines)}


def test_test_only_takes_flags_that_are_not_typed_from_the_checkpoint(runs, tmp_path, capsys):
    stated = {entry["name"].removesuffix(", best"): entry["test"] for entry in report_of(runs.students)["networks"]}
    del stated["resnet_20, standard"]
    assert accuracies_of(capsys, "--job_dir", runs.students) == pytest.approx(stated, abs=0.01)
    assert accuracies_of(capsys, "--resume", runs.students / "checkpoint" / "model_best.pt") == pytest.approx(
        stated, abs=0.01
    )
    alone = accuracies_of(capsys, "--job_dir", runs.teacher)
    assert alone == pytest.approx({"resnet_20": report_of(runs.teacher)["networks"][0]["test"]}, abs=0.01)


def test_test_only_without_an_online_term(tmp_path, capsys):
    network = ("--dataset", "digits", "--teacher_model", "resnet_20", "--num_students", 2, "--lambda", 0)
    flags = (*network, "--num_epochs", 1, "--train_size", 64, "--job_dir", tmp_path / "job")
    main.main(options.parse("main", list(map(str, flags))))
    capsys.readouterr()
    found = accuracies_of(capsys, "--job_dir", tmp_path / "job")
    assert list(found) == ["student 1", "student 2", "online teacher"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "cifar10"), "with --dataset digits: leave out --dataset"),
        (("--conv", "shift"), "with --conv depthwise: leave out --conv"),
        (("--num_students", 3), "with --num_students 2: leave out --num_students"),
        (("--lambda", 0.7), "with --lambda 0.1: leave out --lambda"),
        (("--pretrain",), "without --pretrain: leave out --pretrain"),
        (("--resume", "nowhere.pt"), "nowhere.pt does not exist"),
    ],
)
def test_test_only_refuses_flags_that_contradict_the_checkpoint(runs, flags, message):
    with pytest.raises(UserError, match=message):
        main.main(options.parse("main", list(map(str, ("--test_only", "--job_dir", runs.students, *flags)))))


def write_digits(root, brighten=0):
    """A folder of digits; `brighten` changes the training images alone, and so the statistics of the folder."""
    digits = data.load("digits", None, 0)
    for split, name, number in ((digits.train, "train", 300), (digits.test, "test", 100)):
        for i in range(number):
            path = root / name / str(split.targets[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.maximum(split.images[i], brighten if name == "train" else 0)).save(path)
    return "--dataset", "folder", "--data_dir", root


def test_test_only_normalizes_as_the_network_was_trained(tmp_path, capsys):
    network = ("--teacher_model", "resnet_20", "--num_students", 1, "--method", "scratch", "--num_epochs", 2)
    flags = (*write_digits(tmp_path / "set"), *network, "--job_dir", tmp_path / "job")
    main.main(options.parse("main", list(map(str, flags))))
    capsys.readouterr()
    expected = accuracies_of(capsys, "--job_dir", tmp_path / "job")
    other = write_digits(tmp_path / "other", brighten=200)
    assert accuracies_of(capsys, *other, "--job_dir", tmp_path / "job") == expected
    make_tree(tmp_path / "pets")
    with pytest.raises(UserError, match=r"knows other classes than folder has \(class 0 is '0' there and 'cat' in"):
        accuracies_of(capsys, "--data_dir", tmp_path / "pets", "--job_dir", tmp_path / "job")
