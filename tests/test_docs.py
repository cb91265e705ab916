"""What the README and run.sh tell people to type."""

import copy
import re
import shlex
import subprocess

import pytest
import torch
from PIL import Image

import model
from experiment import classify, study
from model.conv import count_cheap
from model.convert import cheapen, inherit
from model.online import OnlineTeacher
from tests.helpers import ROOT, succeed
from utils import options
from utils.config import flag_name, flags, is_open
from utils.losses import online_distillation

READMES = [path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("*/README.md")))]
FLAGS_README = ROOT / "utils" / "README.md"
COMMANDS = [
    command
    for text in READMES
    for command in re.findall(r"^(?:python|torchrun .*?) ?((?:main|finetune)\.py .*)$", text, flags=re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readmes_are_accepted(command):
    """Trainings take hours, or need data or devices: their flags are parsed alone."""
    script, *flags = shlex.split(command)
    options.parse(script.removesuffix(".py"), flags)


STUDENT = "experiment/digits/refined/resnet_pruned_18"


def test_python_of_the_readme_runs(runs, capsys):
    loop, load = re.findall(r"^```python\n(.*?)^```", READMES[0], flags=re.MULTILINE | re.DOTALL)
    exec(load.replace(STUDENT, str(runs.refined / "resnet_pruned_18")), {})
    assert "resnet_20_sparse depthwise" in capsys.readouterr().out
    network = model.build("resnet_20")
    names = {
        "network": network,
        "batches": [(torch.randn(4, 3, 8, 8), torch.arange(4))],
        **{module.__name__: module for module in (copy, torch)},
        **{function.__name__: function for function in (cheapen, inherit, OnlineTeacher, online_distillation)},
    }
    exec(loop, names)
    assert [count_cheap(student) for student in names["students"]] == [18] * 4
    assert count_cheap(network) == 0


def test_export_and_classification_of_the_readme_run(runs, tmp_path, capsys):
    """With a student, a folder and images that are there."""
    export, classification = (line for line in READMES[0].splitlines() if f"{STUDENT}." in line and "python" in line)
    images = [tmp_path / "a.png", tmp_path / "b.jpg"]
    place = {
        f"{STUDENT}.pt": runs.refined / "resnet_pruned_18.pt",
        f"{STUDENT}.onnx": tmp_path / "resnet_pruned_18.onnx",
        "experiment/digits/refined": tmp_path,
        "IMAGE.png": images[0],
        "ANOTHER.jpg": images[1],
    }
    _, script, *words = shlex.split(export)
    assert "ONNX Runtime finds the class" in succeed(script, *(place.get(word, word) for word in words))
    for image in images:
        Image.new("RGB", (20, 10), "white").save(image)
    _, _, *words = shlex.split(classification)
    assert classify.main([str(place[word]) for word in words]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, images))


def test_readme_has_the_commands_of_the_paper_s_repository_to_the_letter():
    job = "experiment/resnet/lambda_0.8_miu_1"
    assert (
        "main.py --teacher_dir X --arch resnet --teacher_model resnet_56 --student_model resnet_56_sparse "
        f"--lambda 0.8 --miu 1 --job_dir {job}"
    ) in COMMANDS
    assert (
        f"finetune.py --arch resnet --lr 1e-4 --refine {job}/resnet_pruned_54.pt "
        "--job_dir experiment/resnet/ft_lambda_0.8_miu_1/ --pruned"
    ) in COMMANDS


FLAGS_START, FLAGS_END = "<!-- flags -->\n", "<!-- end of flags -->"


def flag_table():
    """Every flag of utils/config.py as Markdown, with its defaults."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in flags():
        text, _, default = field.metadata["help"].partition(" (default: ")
        default = default.removesuffix(")") or ("" if is_open(field.default) else field.default)
        own = field.metadata["finetune"]
        default = f"{default} (finetune.py: {own})" if own is not None else default
        lines.append(f"| `--{flag_name(field.name)}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def with_flag_table(text):
    before, _, rest = text.partition(FLAGS_START)
    return before + FLAGS_START + flag_table() + FLAGS_END + rest.partition(FLAGS_END)[2]


def test_flags_of_the_readme_are_those_of_the_program():
    text = FLAGS_README.read_text()
    assert text == with_flag_table(text), "update it: python -m tests.test_docs"


@pytest.mark.parametrize("name", ["nonsense", "", "demo test", "setup", "satisfied", "compress"])
def test_run_sh_refuses_what_is_no_recipe(name):
    result = subprocess.run(["sh", ROOT / "run.sh", name], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: no recipe '{name}' in run.sh: choose from demo test ")
    assert len(result.stderr.splitlines()) == 1


def test_every_recipe_of_run_sh_is_accepted(tmp_path):
    """The recipes with an interpreter that prints its arguments in place of Python."""
    script = (ROOT / "run.sh").read_text()
    recipes = re.findall(r"^([a-z]\w*)\(\) \{$", script, flags=re.MULTILINE)
    recipes = [name for name in recipes if name not in ("setup", "test", "compress", "imagenet")]
    assert len(recipes) > 5
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "run.sh").write_text(script)
    students = tmp_path / "experiment" / "digits" / "students"
    students.mkdir(parents=True)
    (students / "resnet_pruned_18.pt").touch()
    interpreter = tmp_path / "bin" / "python"
    interpreter.parent.mkdir()
    interpreter.write_text('#!/bin/sh\n[ "$1" = - ] || printf "%s\\n" "$*"\n')
    interpreter.chmod(0o755)
    environment = {"PATH": f"{interpreter.parent}:/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}
    for name in recipes:
        output = subprocess.run(
            ["sh", tmp_path / "run.sh", name], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert output
        for line in output.splitlines():
            script_name, *flags = shlex.split(line)
            if script_name == "experiment/study.py":
                study.parse(flags)
            else:
                options.parse(script_name.removesuffix(".py"), flags)
    assert not (tmp_path / ".venv").exists()


if __name__ == "__main__":
    FLAGS_README.write_text(with_flag_table(FLAGS_README.read_text()))
