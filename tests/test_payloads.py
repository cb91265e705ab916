"""Files that would run code when they are unpickled, in every place where a script reads a file: none of it runs."""

import pytest
import torch

import finetune
import main
from tests.helpers import content_of
from tests.test_checkpoint import Payload, training_checkpoint, write_malicious, write_pickle
from utils import options
from utils.errors import UserError

DIGITS = ("--dataset", "digits", "--teacher_model", "resnet_20")


def write_legacy(path):
    torch.save({"state_dict": Payload(path.parent / "ran")}, path, _use_new_zipfile_serialization=False)


def test_the_payload_would_run(tmp_path):
    write_malicious(tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("write", [write_malicious, write_pickle, write_legacy], ids=["archive", "pickle", "legacy"])
@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [
        (main, (*DIGITS, "--teacher_dir", "{}"), "teacher.pt"),
        (main, (*DIGITS, "--teacher_dir", "{}"), "teacher.safetensors"),
        (main, (*DIGITS, "--teacher_dir", "{folder}"), "resnet_20.pt"),
        (main, (*DIGITS, "--resume", "{}"), "last.pt"),
        (main, (*DIGITS, "--resume", "{}", "--test_only"), "last.pt"),
        (main, (*DIGITS, "--resume", "--job_dir", "{folder}/.."), "last.pt"),
        (finetune, ("--refine", "{}"), "last.pt"),
        (finetune, ("--refine", "{}", "--pruned"), "student.pt"),
    ],
)
def test_code_in_files_of_weights_does_not_run(tmp_path, write, script, flags, name):
    folder = tmp_path / "job" / "checkpoint"
    folder.mkdir(parents=True)
    write(folder / name)
    flags = ["--job_dir", str(tmp_path / "new"), *(flag.format(folder / name, folder=folder) for flag in flags)]
    with pytest.raises(UserError, match="cannot be read as"):
        script.main(options.parse(script.__name__, flags))
    assert not (folder / "ran").exists()
    assert not (tmp_path / "new").exists()


def test_python_files_that_only_a_checkpoint_names_do_not_run(tmp_path):
    """Neither when a student is loaded nor when a training checkpoint is evaluated."""
    (tmp_path / "net.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    training_checkpoint(tmp_path / "last.pt")
    content = content_of(tmp_path / "last.pt")
    content["meta"] |= {"arch": str(tmp_path / "net.py"), "model": "net_sparse"}
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="needs the code that built its network: give --arch"):
        main.main(options.parse("main", ["--test_only", "--resume", str(tmp_path / "last.pt")]))
    assert not (tmp_path / "ran").exists()
