"""Files that would run code when they are unpickled, in every place where a script reads a file: none of it runs."""

import numpy as np
import pytest
import torch

import data
import finetune
import main
from tests.helpers import make_tree
from tests.test_checkpoint import Payload, training_checkpoint, write_malicious, write_pickle
from utils import checkpoint, options
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


@pytest.mark.parametrize("where", ["all of it", "fingerprint", "images", "damaged"])
def test_code_in_the_cache_of_a_folder_does_not_run(tmp_path, where):
    """The images are decoded anew instead."""
    make_tree(tmp_path / "set")
    before = data.load("folder", tmp_path / "set", 0)
    cache = tmp_path / "set.cache.npz"
    if where == "all of it":
        write_pickle(cache)
    else:
        with np.load(cache) as file:
            content = dict(file)
        np.savez(cache, **content | {where: np.array([Payload(tmp_path / "ran")], dtype=object)})
    after = data.load("folder", tmp_path / "set", 0)
    assert np.array_equal(before.train.images, after.train.images)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", [{"damaged": [12]}, {"damaged": [-1]}, {"reasons": []}])
def test_a_cache_whose_parts_contradict_each_other_is_made_anew(tmp_path, change):
    make_tree(tmp_path / "set", count=3)
    before = data.load("folder", tmp_path / "set", 0)
    cache = tmp_path / "set.cache.npz"
    with np.load(cache) as file:
        content = dict(file)
    content |= {"images": content["images"][1:], "damaged": [0], "reasons": ["no image"]} | change
    np.savez(cache, **content)
    after = data.load("folder", tmp_path / "set", 0)
    assert np.array_equal(before.train.images, after.train.images)
    assert after.skipped.reasons == {}


def test_python_files_that_only_a_checkpoint_names_do_not_run(tmp_path):
    """Neither when a student is loaded nor when a training checkpoint is evaluated."""
    (tmp_path / "net.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    training_checkpoint(tmp_path / "last.pt")
    content = checkpoint.load(tmp_path / "last.pt")
    content["meta"] |= {"arch": str(tmp_path / "net.py"), "model": "net_sparse"}
    checkpoint.save(tmp_path / "last.pt", content)
    with pytest.raises(UserError, match="needs the code that built its network: give --arch"):
        main.main(options.parse("main", ["--test_only", "--resume", str(tmp_path / "last.pt")]))
    assert not (tmp_path / "ran").exists()
