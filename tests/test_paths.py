"""Files of others in the places that a run writes to, symbolic links, and names that shells find hard."""

import json
import os
from pathlib import Path

import pytest

import finetune
import main
from tests.helpers import make_tree, measure_latencies_once
from utils import options
from utils.config import RESUME_LAST
from utils.errors import UserError
from utils.files import atomic_write
from utils.job import Job

CONFIG = {"pretrain": True, "teacher_model": "resnet_20", "job_dir": "job", "lambda": 0.0, "miu": 0.0}
DIGITS = ("--dataset", "digits", "--teacher_model", "resnet_20")


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(path, text="precious"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("flags", [(), ("--reset",), ("--resume",)])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"model_type": "bert"}'),
        ("config.json", "[1]"),
        ("config.json", "\0"),
        ("report.md", "mine"),
        ("logger.log", "mine"),
        ("curves.png", "mine"),
        ("checkpoint/model_best.pt", "mine"),
        ("resnet_20.pt", "mine"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path, name, text, flags):
    write(tmp_path / "job" / name, text)
    before = content(tmp_path)
    args = options.parse("main", [*DIGITS, "--pretrain", "--job_dir", str(tmp_path / "job"), *flags])
    with pytest.raises(UserError, match=r"no config\.json of this program"):
        main.main(args)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["lock", "config.json", "checkpoint/last.pt", "report.md"])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / "job" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is not a file"):
        Job(tmp_path / "job", CONFIG).checkpoint_to_resume(None, False, [])


@pytest.mark.parametrize("name", [".", "checkpoint", "run/train"])
def test_a_link_to_nothing_in_the_place_of_a_folder_is_named(tmp_path, name):
    link = tmp_path / "job" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"{link} is a symbolic link to nothing"):
        Job(tmp_path / "job", CONFIG).checkpoint_to_resume(None, False, [])
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("flags", [(None, False), (RESUME_LAST, False), (None, True)])
def test_a_run_that_ended_meanwhile_is_not_overwritten(tmp_path, flags):
    """Between a run's first look at its folder and its start lie the seconds in which it reads the data."""
    slow, fast = (Job(tmp_path / "job", CONFIG) for _ in range(2))
    resume, reset = flags
    for job in (slow, fast):
        job.checkpoint_to_resume(resume, reset, [])
    fast.open(None, epoch=0, reset=False)
    fast.add_metrics(1, 0.1, {}, {})
    fast.close()
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"another run has written .* meanwhile"):
        slow.open(None, epoch=0, reset=reset)
    assert content(tmp_path) == before


def reset(folder, config=CONFIG):
    job = Job(folder, config)
    job.checkpoint_to_resume(None, True, [])
    job.open(None, epoch=0, reset=True)
    job.close()


def test_reset_deletes_nothing_outside_the_job_dir(tmp_path):
    """Whatever its config.json calls the exported network."""
    write(tmp_path / "precious.pt")
    write(tmp_path / "job" / "config.json", json.dumps(CONFIG | {"teacher_model": "../precious"}))
    reset(tmp_path / "job")
    assert (tmp_path / "precious.pt").exists()


def test_reset_deletes_nothing_behind_a_link(tmp_path):
    """A folder of checkpoints elsewhere is refused; tensorboard's folders are left as they are, links to files go."""
    elsewhere, job = tmp_path / "elsewhere", tmp_path / "job"
    write(elsewhere / "events.out.tfevents.1.other")
    write(elsewhere / "last.pt")
    write(elsewhere / "report.md")
    write(job / "config.json", json.dumps(CONFIG))
    (job / "checkpoint").symlink_to(elsewhere)
    before = content(elsewhere)
    with pytest.raises(UserError, match=r"behind a symbolic link: delete .*checkpoint/last\.pt yourself"):
        reset(job)
    (job / "checkpoint").unlink()
    (job / "run").mkdir()
    (job / "run" / "train").symlink_to(elsewhere)
    (job / "report.md").symlink_to(elsewhere / "report.md")
    reset(job)
    assert {path: text for path, text in content(elsewhere).items() if path in before} == before
    assert not (job / "report.md").exists()


def test_a_job_dir_that_is_a_link_is_reset_like_any_other(tmp_path):
    write(tmp_path / "real" / "config.json", json.dumps(CONFIG))
    write(tmp_path / "real" / "report.md")
    write(tmp_path / "real" / "run" / "train" / "events.out.tfevents.1.old")
    (tmp_path / "link").symlink_to("real")
    reset(tmp_path / "link")
    assert not (tmp_path / "real" / "report.md").exists()
    assert not (tmp_path / "real" / "run" / "train" / "events.out.tfevents.1.old").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two  spaces имя-名前-é [a]*?{b}", "-dash\nline break $HOME 'x' \"y\""])
def test_any_name_will_do(tmp_path, monkeypatch, name):
    """For the data, the jobs, the teacher, the refined student and the resumed checkpoint; relative, with a slash."""
    monkeypatch.chdir(tmp_path)
    measure_latencies_once(monkeypatch)
    top = Path(name)
    make_tree(top / "set", size=(6, 6))
    data = ("--dataset", "folder", f"--data_dir={top}/set/", "--val_size", "4", "--num_epochs", "1", "--force")
    networks = ("--teacher_model", "resnet_20", "--num_students", "1")
    (top / "real").mkdir()
    (top / "students").symlink_to("real")

    def run(script, *flags):
        (main if script == "main" else finetune).main(options.parse(script, flags))

    run("main", *data[:-1], *networks[:2], "--pretrain", f"--job_dir={top}/./teacher//")
    students = (*data, *networks, f"--teacher_dir={top}/teacher/", f"--job_dir={top}/students/")
    run("main", *students, "--lr_decay_step", "1")
    run("main", *students, "--lr_decay_step", "1", "--num_epochs", "2", f"--resume={top}/students/checkpoint/last.pt")
    refine = (f"--refine={top}/students/resnet_pruned_18.pt", "--pruned", "--num_epochs", "1")
    run("finetune", *refine, f"--job_dir={tmp_path / top}/refined")
    run("finetune", *refine, f"--job_dir={tmp_path / top}/refined", "--reset")
    assert (top / "real" / "report.md").is_file()
    assert json.loads((top / "real" / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 2
    assert (top / "refined" / "resnet_pruned_18.pt").is_file()
    assert os.listdir() == [name]


def test_names_that_are_not_utf_8_can_be_written(tmp_path):
    with atomic_write(tmp_path / "report.md", "w") as file:
        file.write(os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == r"caf\udce9"


@pytest.mark.parametrize("name", ["x" * 250, "file/report.md"], ids=["too long", "no folder"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    """The temporary file beside it, which cannot be deleted either, is not mentioned."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*: (File name too long|Not a directory)"),
        atomic_write(tmp_path / name),
    ):
        raise AssertionError("it was opened")
