"""The study: its grid, its tables against what they are of, and a real one, interrupted and continued."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime

import pytest

from experiment import results, study
from tests.helpers import ROOT
from utils import options
from utils.errors import UserError


def runs_of(name):
    teachers = {run.teacher for run in study.grid(name)} - {None}
    return [*teachers, *study.grid(name)]


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_run_is_a_command_of_its_own_that_main_accepts(name, tmp_path):
    runner = study.Runner(tmp_path, tmp_path, jobs=1)
    runs = runs_of(name)
    assert len({run.name for run in runs}) == len(runs)
    settings = set()
    for run in runs:
        script, *flags = runner.command(run)
        assert script == "main.py"
        args = vars(options.parse("main", flags))
        settings.add(json.dumps({key: str(value) for key, value in args.items() if key != "job_dir"}, sort_keys=True))
        without = run.variant in ("teacher", "scratch", "dml", "one") or run.variant.startswith("od_teacher_free")
        assert bool(args["teacher_dir"]) == (not without)
    assert len(settings) == len(runs), "two runs compute the same"


def test_what_is_compared_differs_by_its_method_alone(tmp_path):
    runner = study.Runner(tmp_path, None, jobs=1)
    variants = {run.variant: run for run in study.grid("digits") if run.conv == "shift" and run.seed == 2}
    args = {name: vars(options.parse("main", runner.command(run)[1:])) for name, run in variants.items()}
    of_method = {"method", "num_students", "lam", "miu", "temperature", "rampup_epochs", "teacher_dir", "job_dir"}
    common = {
        name: {key: value for key, value in flags.items() if key not in of_method} for name, flags in args.items()
    }
    assert set(common) == set(results.METHODS)
    assert all(flags == common["od"] for flags in common.values())


def record(variant, seed, test, students=None, online=None, conv="depthwise", **settings):
    """One line of a records file."""
    of_teacher = variant == "teacher"
    return {
        "run": f"resnet_20-{conv}-{variant}-{seed}", "variant": variant, "model": "resnet_20",
        "conv": None if of_teacher else conv, "seed": seed,
        "settings": {"num_students": 2, "lambda": 0.8, "miu": 1.0} | settings, "val": test - 1, "test": test,
        "students": [{"val": value - 1, "test": value} for value in students or [test]],
        "online_teacher": {"val": online - 1, "test": online} if online else None,
        "params": 272474 if of_teacher else 40522, "macs": 40813184 if of_teacher else 7938688,
        "data": "digits: 10 classes", "flags": "--dataset=digits",
        "environment": {"device": "a CPU", "execution": "fused kernels", "torch": "2.11"},
    }  # fmt: skip


def diverged(variant, seed, **settings):
    known = ("run", "variant", "model", "conv", "seed", "settings")
    return {key: record(variant, seed, 0, **settings)[key] for key in known} | {"diverged": "the loss is not finite"}


@pytest.fixture
def written(tmp_path):
    """RESULTS.md of a few made-up records."""
    ours, theirs = (80.0, 81.0, 83.0), (75.0, 77.0, 76.0)
    records = [record("teacher", 0, 90.0)]
    records += [record("od", seed, test, [test, test - 2], 85.0) for seed, test in enumerate(ours)]
    records += [record("scratch", seed, test, num_students=1) for seed, test in enumerate(theirs)]
    records += [record("od_lambda_0.1", 0, 79.0, [79.0, 78.0], 84.0, **{"lambda": 0.1}), record("od_detached", 0, 70.5)]
    records += [diverged("od_lambda_3", 0, **{"lambda": 3.0})]
    records += [record("od_teacher_free", 0, 78.0, online=79.0, miu=0.0)]
    records += [record("od_teacher_free_lambda_2", 0, 77.0, online=78.0, **{"lambda": 2.0, "miu": 0.0})]
    path = results.records_file(tmp_path, "digits")
    path.parent.mkdir()
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    results.write_results(tmp_path)
    return (tmp_path / "RESULTS.md").read_text(), ours, theirs


def test_tables_state_mean_deviation_and_number(written):
    text, ours, _ = written
    mean, std = statistics.fmean(ours), statistics.stdev(ours)
    row = f"| resnet_20, depthwise | OD | 2 | {mean:.2f} ± {std:.2f} | {mean - 1:.2f} ± {std:.2f} | 85.00 ± 0.00 |"
    assert f"{row} {mean - 1:.2f} ± {std:.2f} | 3 |" in text
    assert "| resnet_20, standard: the pretrained teacher | | | 90.00 | | | 89.00 | 1 |" in text
    assert "| 0.1 | 79.00 | 78.50 | 84.00 | 78.00 | 1 |" in text
    assert "| 0.8 | 80.00 | 79.00 | 85.00 | 79.00 | 1 |" in text, "of the seeds that 0.1 has, too"
    assert "online teacher detached (--detach_teacher) | 70.50 |" in text
    assert "| 3 | diverged | | | | 1 |" in text
    assert "| λ (μ = 0) |" in text
    assert "| 2 | 77.00 | 77.00 | 78.00 | 76.00 | 1 |" in text


def test_runs_that_diverged_are_counted():
    group = [record("od", 0, 80.0, online=81.0), diverged("od", 1), record("od", 2, 82.0, online=83.0)]
    assert results._cells(group).startswith("81.00 ± 1.41 | ")
    assert results._cells(group).endswith(" | 2, 1 diverged")


def test_differences_come_with_the_sum_of_the_standard_errors(written):
    text, ours, theirs = written
    gain = statistics.fmean(ours) - statistics.fmean(theirs)
    errors = sum(statistics.stdev(values) / 3**0.5 for values in (ours, theirs))
    assert f"| resnet_20, depthwise | {gain:+.2f} ± {errors:.2f} |" in text
    assert f"| resnet_20, depthwise | {78 - statistics.fmean(theirs):+.2f} |  |  |  |" in text, "without teacher"


def test_plots_are_drawn(written, tmp_path):
    for name in ("digits_costs", "digits_sweeps"):
        assert f"(results/{name}.png)" in written[0]
        assert (tmp_path / "results" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


TINY = """
import sys
from experiment import study

flags = ("--dataset=digits", "--lr=0.05")
study.STUDIES = {"tiny": study.Study(flags, ("resnet_20",), ("depthwise",), 2, 3, seeds=1, changes_seeds=0)}
study.run_script(lambda: study.main(study.parse()))
"""


def start(out):
    command = [sys.executable, "-c", TINY, "tiny", "--out", str(out), "--jobs", "2"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_interrupted_study_goes_on_where_it_stopped(tmp_path):
    first = start(tmp_path)
    records = results.records_file(tmp_path, "tiny")
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert errors == "interrupted: the runs are saved where they are; the same command goes on from there\n"
    before = records.read_text()
    assert 0 < before.count("\n") < 10

    second = start(tmp_path)
    output, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    after = records.read_text()
    assert after.startswith(before)
    runs = [json.loads(line)["run"] for line in after.splitlines()]
    assert len(runs) == len(set(runs)) == 10  # nine variants and the teacher
    assert f"tiny: {before.count(chr(10))} runs are recorded" in output
    jobs = tmp_path / "study" / "tiny"
    started = datetime.fromisoformat((jobs / "resnet_20-depthwise-scratch-0" / "logger.log").read_text()[:19])
    taught = (jobs / "resnet_20-teacher-0" / "report.json").stat().st_mtime
    assert started.timestamp() < taught, "a run waited for a teacher that it does not need"
    report = json.loads((jobs / "resnet_20-depthwise-od-0" / "report.json").read_text())
    best = next(row for row in report["networks"] if row["name"].endswith("best"))
    assert f"| resnet_20, depthwise | OD | 2 | {best['test']:.2f} |" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_none(tmp_path, monkeypatch):
    for name, flags in {"wild": ("--dataset=digits", "--lr=1e9"), "wrong": ("--dataset=digits", "--lr=-1")}.items():
        tiny = study.Study(flags, ("resnet_20",), ("depthwise",), 2, 2, seeds=1, changes_seeds=0)
        monkeypatch.setitem(study.STUDIES, name, tiny)
    runner = study.Runner(tmp_path, None, jobs=1)
    record = runner.train(next(study.grid("wild")))
    assert record["diverged"].startswith("the loss is not finite in epoch 1")
    assert record["settings"] == {"num_students": 1, "lambda": 0.0, "miu": 0.0}
    assert runner.train(next(study.grid("wrong"))) is None


def test_a_run_with_other_flags_is_not_taken_for_the_one_in_the_grid(tmp_path):
    runner = study.Runner(tmp_path, None, jobs=1)
    run = next(run for run in study.grid("digits") if run.variant == "od")
    config = options.configuration(options.parse("main", runner.command(run)[1:]))
    path = runner.job_dir(run) / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(config | {"pruned_num": 18, "workers": 7}))
    runner.check_folder(run)
    path.write_text(json.dumps(config | {"lambda": 0.8}))
    with pytest.raises(UserError, match=r"was trained with --lambda 0\.8, not 0\.1: delete it"):
        runner.run("digits")
    assert not results.records_file(tmp_path, "digits").exists()


def test_a_mistyped_study_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        study.parse(["digitz"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'digitz'" in line


def test_a_study_of_images_asks_for_them(tmp_path):
    command = [sys.executable, "experiment/study.py", "cifar10", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: the study cifar10 needs --data_dir, CIFAR-10 as a tree of image files\n"
    assert not list(tmp_path.iterdir())
