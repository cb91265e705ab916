"""The study: its list of runs, its tables against the records they show, and a real one, interrupted and continued."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime

import pytest

from experiment import results, studies, study
from experiment.studies import Row, Study, Table
from tests.helpers import ROOT
from utils import options
from utils.checkpoint import load_student
from utils.errors import UserError


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_run_is_a_command_of_its_own_that_main_accepts(name, tmp_path):
    runner = study.Runner(tmp_path, tmp_path, jobs=1)
    runs = list(study.grid(name))
    assert len({run.name for run in runs}) == len(runs)
    settings = set()
    for run in runs:
        script, *flags = runner.command(run)
        assert script == "main.py"
        args = vars(options.parse("main", flags))
        settings.add(json.dumps({key: str(value) for key, value in args.items() if key != "job_dir"}, sort_keys=True))
        assert bool(args["teacher_dir"]) == (run.teacher is not None)
        if run.teacher:
            assert run.teacher.row.flags.startswith("--pretrain")
            assert args["teacher_dir"] == runner.exported(run.teacher)
    assert len(settings) == len(runs), "two runs compute the same"


@pytest.mark.parametrize("name", studies.STUDIES)
def test_rows_that_are_compared_are_trained_on_the_same_data_for_as_long(name, tmp_path):
    runner = study.Runner(tmp_path, tmp_path, jobs=1)
    same = ("conv", "dataset", "train_size", "val_size", "num_epochs", "train_batch_size", "lr", "scheduler")
    runs = {(run.table.key, run.row.variant): run for run in study.grid(name)}
    for table in studies.STUDIES[name].tables:
        pairs = [(ours, theirs) for ours, others in studies.COMPARED.items() for theirs in others.split()]
        for pair in [pair for pair in pairs if {row.variant for row in table.rows}.issuperset(pair)]:
            first, second = (
                vars(options.parse("main", runner.command(runs[table.key, variant])[1:])) for variant in pair
            )
            assert {key: first[key] for key in same} == {key: second[key] for key in same}


TINY = Study(
    "A tiny study", None, "--dataset digits --lr 0.05 --teacher_model resnet_20",
    (
        Table(
            "depthwise", "Depthwise", "--conv depthwise",
            (
                Row("scratch", "scratch", "--method scratch", seeds=2),
                Row("OD", "od", "--num_students 2", "teacher", seeds=1),
                Row("standard", "teacher", "--pretrain", seeds=1),
                Row("from the teacher", "scratch_init", "--method scratch --init teacher", "teacher", seeds=1),
            ),
        ),
    ),
)  # fmt: skip


def record(variant, seed, test, students=None, online=None, **changes):
    """One line of a records file."""
    return {
        "run": f"depthwise-{variant}-{seed}", "table": "depthwise", "variant": variant, "model": "resnet_20",
        "conv": None if variant == "teacher" else "depthwise", "seed": seed,
        "settings": {"num_students": len(students or [1]), "lambda": 0.8, "miu": 1.0},
        "val": test - 1, "test": test, "students": [{"val": value - 1, "test": value} for value in students or [test]],
        "online_teacher": {"val": online - 1, "test": online, "params": 10**5, "macs": 1} if online else None,
        "disagreement": 5.0 if students else None, "params": 40522, "macs": 7938688, "data": "digits: 10 classes",
        "environment": {"device": "a CPU", "execution": "fused kernels", "torch": "2.11"},
    } | changes  # fmt: skip


OURS, THEIRS = (80.0, 81.0, 83.0), (75.0, 77.0, 76.0)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """RESULTS.md of a few made-up records."""
    monkeypatch.setattr(results, "STUDIES", {"tiny": TINY})
    records = [record("teacher", 0, 90.0)]
    records += [record("od", seed, test, [test, test - 2], 85.0) for seed, test in enumerate(OURS)]
    records += [record("scratch", seed, test) for seed, test in enumerate(THEIRS)]
    diverged = record("scratch_init", 0, 0)
    records.append({key: diverged[key] for key in ("run", "table", "variant", "conv", "seed", "settings")})
    records[-1]["diverged"] = "the loss is not finite"
    path = results.records_file(tmp_path, "tiny")
    path.parent.mkdir()
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    results.write_results(tmp_path)
    return (tmp_path / "RESULTS.md").read_text()


def test_tables_state_mean_standard_error_and_number(written):
    mean, error = statistics.fmean(OURS), statistics.stdev(OURS) / 3**0.5
    students = f"{mean:.2f} ± {error:.2f} | {mean - 1:.2f} ± {error:.2f}"
    assert f"| OD | 2 | 40,522 | {students} | 85.00 ± 0.00 | 100,000 | 5.00 ± 0.00 | 3 |" in written
    assert "| standard | 1 | 40,522 | 90.00 |  |  |  |  | 1 |" in written
    assert "| from the teacher |  |  |  |  |  |  |  | 0, 1 diverged |" in written


def test_differences_come_with_the_sum_of_the_standard_errors(written):
    gain = statistics.fmean(OURS) - statistics.fmean(THEIRS)
    errors = sum(statistics.stdev(values) / 3**0.5 for values in (OURS, THEIRS))
    row = f"| OD, minus scratch | {gain:+.2f} ± {errors:.2f} | {gain - 1:+.2f} ± {errors:.2f} |"
    assert row in written
    assert "from the teacher, minus" not in written


def test_a_picture_is_drawn(written, tmp_path):
    assert "(results/tiny-depthwise.png)" in written
    assert (tmp_path / "results" / "tiny-depthwise.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("backwards", [False, True])
def test_any_part_of_the_runs_is_worth_a_table_and_a_picture(written, backwards, tmp_path):
    path = results.records_file(tmp_path, "tiny")
    lines = path.read_text().splitlines(keepends=True)
    lines = lines[::-1] if backwards else lines
    for count in range(1, len(lines) + 1):
        picture = path.with_name("tiny-depthwise.png")
        picture.unlink(missing_ok=True)
        path.write_text("".join(lines[:count]))
        results.write_results(tmp_path)
        text = (tmp_path / "RESULTS.md").read_text()
        titles = {row.variant: row.title for row in TINY.tables[0].rows}
        known = [json.loads(line) for line in lines[:count]]
        shown = {row.split(" | ")[0].removeprefix("| ") for row in text.splitlines() if row.startswith("| ")}
        assert {titles[entry["variant"]] for entry in known} == shown & set(titles.values())
        trained = any("test" in entry for entry in known)
        assert ("(results/tiny-depthwise.png)" in text) == picture.exists() == trained


def test_the_tables_of_this_repository_are_those_of_its_records(tmp_path):
    for path in (ROOT / "experiment" / "results").glob("*.jsonl"):
        target = tmp_path / "results" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    results.write_results(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "experiment" / "RESULTS.md").read_text()


SCRIPT = """
from experiment import results, studies, study
from tests.test_study import TINY

studies.STUDIES["tiny"] = TINY._replace(flags=TINY.flags + " --num_epochs 3")
study.run_script(lambda: study.main(study.parse()))
"""


def start(out, *flags):
    command = [sys.executable, "-c", SCRIPT, "tiny", "--out", str(out), "--jobs", "2", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """The folder of the tiny study, interrupted and continued; its records before; what the second command printed."""
    out = tmp_path_factory.mktemp("tiny")
    first = start(out)
    records = results.records_file(out, "tiny")
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert errors == "interrupted: the runs are saved; the same command continues them\n"
    before = records.read_text()
    assert 0 < before.count("\n") < 5
    second = start(out)
    output, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    return out, before, output


@pytest.mark.slow
def test_interrupted_study_goes_on_where_it_stopped(continued):
    out, before, output = continued
    after = results.records_file(out, "tiny").read_text()
    assert after.startswith(before)
    entries = {entry["run"]: entry for entry in map(json.loads, after.splitlines())}
    assert len(entries) == after.count("\n") == 5
    assert f"tiny: {before.count(chr(10))} runs are recorded" in output
    jobs = out / "study" / "tiny"
    began = datetime.fromisoformat((jobs / "depthwise-scratch-0" / "logger.log").read_text()[:19])
    taught = (jobs / "depthwise-teacher-0" / "report.json").stat().st_mtime
    assert began.timestamp() < taught, "a run waited for a teacher that it does not need"

    od = entries["depthwise-od-0"]
    assert f"| OD | 2 | {od['params']:,} | {od['test']:.2f} |" in (out / "RESULTS.md").read_text()
    assert od["teacher"]["test"] == entries["depthwise-teacher-0"]["test"]
    assert od["online_teacher"]["params"] > od["params"]
    assert od["seconds"] > 0
    assert od["environment"]["threads"] >= 1
    assert entries["depthwise-scratch_init-0"]["start"].startswith("from the weights of the pretrained teacher")
    kept = sorted(path.stem for path in results.networks_folder(out, "tiny").iterdir())
    assert kept == sorted(name for name in entries if name.endswith("-0"))
    _, meta = load_student(results.networks_folder(out, "tiny") / "depthwise-od-0.pt")
    assert meta["accuracy"]["test"] == od["test"]
    assert str(out) not in json.dumps(meta), "paths of the machine that trained it"


@pytest.mark.slow
def test_kept_networks_are_scored_again_from_their_files(continued, monkeypatch, capsys):
    out, *_ = continued
    monkeypatch.setitem(study.STUDIES, "tiny", TINY)
    args = study.parse(["tiny", "--out", str(out), "--check"])
    with pytest.raises(SystemExit) as exit_:
        study.main(args)
    assert exit_.value.code == 0
    entries = {entry["run"]: entry for entry in results.read_records(out, "tiny")}
    accuracy = f"{entries['depthwise-od-0']['test']:.2f}"
    printed = capsys.readouterr().out.splitlines()
    assert f"depthwise-od-0: recorded {accuracy}, found {accuracy}" in printed
    assert len(printed) == 1 + sum(entry["seed"] == 0 for entry in entries.values())

    with pytest.raises(SystemExit):
        study.main(study.parse(["tiny", "--out", str(out), "--check", "--only", "depthwise-od-*"]))
    assert len(capsys.readouterr().out.splitlines()) == 2

    entries["depthwise-od-0"]["test"] += 1
    monkeypatch.setattr(study, "read_records", lambda *_: list(entries.values()))
    with pytest.raises(SystemExit) as exit_:
        study.main(args)
    assert exit_.value.code == 1
    assert "3 of 4 networks have their recorded test accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_none(tmp_path, monkeypatch):
    for name, flags in {"wild": "--lr 1e9 --num_epochs 2", "wrong": "--lr -1"}.items():
        monkeypatch.setitem(study.STUDIES, name, TINY._replace(flags=f"--dataset digits {flags}"))
    runner = study.Runner(tmp_path, None, jobs=1)
    runner.run("wild", "*-scratch-0")
    (record,) = results.read_records(tmp_path, "wild")
    assert record["diverged"].startswith("the loss is not finite in epoch 1")
    assert record["settings"] == {"num_students": 1, "lambda": 0.0, "miu": 0.0}
    with pytest.raises(UserError, match="5 runs failed"):  # the teacher's, and those that need it, among them
        runner.run("wrong", "*-[01]")


def test_a_run_with_other_flags_is_not_taken_for_the_one_in_the_grid(tmp_path):
    runner = study.Runner(tmp_path, None, jobs=1)
    run = next(run for run in study.grid("digits") if run.row.variant == "od")
    config = options.parse("main", runner.command(run)[1:]).recorded()
    path = runner.job_dir(run) / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(config | {"pruned_num": 18, "workers": 7}))
    runner.check_folder(run)
    path.write_text(json.dumps(config | {"lambda": 0.8}))
    with pytest.raises(UserError, match=r"was trained with --lambda 0\.8, not 0\.1: delete it"):
        runner.run("digits", run.name)
    assert not results.records_file(tmp_path, "digits").exists()


def test_only_chooses_runs_by_their_names(tmp_path):
    names = [run.name for run in study.grid("cifar100", "depthwise-*-0")]
    assert "depthwise-od-0" in names
    assert all(name.startswith("depthwise-") and name.endswith("-0") for name in names)
    with pytest.raises(UserError, match="has no run 'x': its runs have names like "):
        study.Runner(tmp_path, None, jobs=1).run("digits", "x")


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
    assert result.stderr.startswith("error: the study cifar10 needs --data_dir, CIFAR-10 as a tree of image files")
    assert not list(tmp_path.iterdir())
