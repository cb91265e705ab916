"""Classes from a CSV file: the same data as from class folders, and mistakes in the file."""

import csv
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import data
from tests.helpers import content_of, fail, make_tree, meta, succeed
from utils import options
from utils.checkpoint import Meta
from utils.errors import UserError
from utils.files import from_plain


def rows_of(root):
    """(path, class, split) of each image of a tree, in no order."""
    files = [path.relative_to(root) for path in root.rglob("*.png")]
    rows = [(str(path), path.parts[1], path.parts[0]) for path in files]
    random.Random(0).shuffle(rows)
    return rows


def write(path, header, rows, **options):
    with open(path, "w", newline="", **options) as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def tree(tmp_path):
    make_tree(tmp_path / "set", splits=("train", "val", "test"), count=10)
    return tmp_path / "set"


@pytest.mark.parametrize("image_size", [None, 32])
def test_a_file_with_the_classes_of_the_folders_is_the_same_data_set(tree, tmp_path, image_size):
    """In any order of rows and columns, with further columns, as a spreadsheet writes it, and with other names."""
    rows = [(i, "validation" if split == "val" else split.upper(), f" {label}", path)
            for i, (path, label, split) in enumerate(rows_of(tree))]  # fmt: skip
    labels = write(tmp_path / "a.csv", ("id", "Split", "label ", "PATH"), rows, encoding="utf-8-sig")
    expected = data.load("folder", tree, 0.1, image_size=image_size)
    dataset = data.load("folder", tree, 0.1, image_size=image_size, labels=labels)
    assert dataset.fingerprints(tree) == expected.fingerprints(tree)
    assert (dataset.classes, dataset.mean, dataset.std) == (expected.classes, expected.mean, expected.std)
    assert dataset.remarks == []


def test_without_a_column_split_a_fifth_of_each_class_is_the_test_set(tree, tmp_path):
    rows = [(tree / path, label) for path, label, _ in rows_of(tree)]
    first, again = (
        data.load("folder", tmp_path, 0, labels=write(tmp_path / "a.csv", ("path", "label"), order))
        for order in (rows, rows[::-1])
    )
    assert [np.bincount(split.targets).tolist() for split in (first.train, first.test)] == [[24, 24], [6, 6]]
    known = {image.tobytes() for split in (first.train, first.test) for image in split.images}
    assert len(known) == 60
    assert first.fingerprints(tmp_path) == again.fingerprints(tmp_path)
    assert "no column split" in first.remarks[0]


TWO = [("train/cat/0.png", "cat", "train"), ("test/cat/0.png", "cat", "test")]
GOOD = [*TWO, ("train/dog/0.png", "dog", "train"), ("train/dog/1.png", "dog", "train")]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path;label", [], "needs one column path, but its first line names path;label"),
        ("path,name", GOOD, "needs one column label, but its first line names path, name"),
        ("path,label,label", GOOD, "needs one column label"),
        ("path,label,split", [], "has no rows"),
        ("path,label,split", [*GOOD, ("train/dog/2.png", "", "train")], "line 6: the label is missing"),
        ("path,label,split", [*GOOD, ("", "dog", "train")], "line 6: the path is missing"),
        ("path,label,split", [*GOOD, ("train/dog/2.png",)], "line 6: the label is missing"),
        ("path,label,split", [*GOOD, ("train/dog/2.png", "dog", "dev")], "line 6: the split is 'dev'"),
        ("path,label,split", [*GOOD, ("train/dog/2.png", "do\ng", "train")], "a label is one line"),
        ("path,label,split", [*GOOD, ("train/dog/none.png", "dog", "train")], r"line 6: .*none\.png does not exist"),
        ("path,label,split", [*GOOD, ("test/../train/cat/0.png", "dog", "test")], "line 6: .* is in line 2, too"),
        ("path,label,split", [*GOOD, ("test/dog/0.png", "fox", "test")], "class that train does not have: fox"),
        ("path,label,split", TWO, "holds 1 class"),
        ("path,label,split", [*TWO[:1], *GOOD[2:]], "has train rows alone"),
    ],
)
def test_mistakes_in_the_file(tree, tmp_path, header, rows, message):
    labels = write(tmp_path / "a.csv", header.split(","), rows)
    with pytest.raises(UserError, match=message) as error:
        data.load("folder", tree, 0, labels=labels)
    assert "a.csv" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"path,label\n\xe9,cat\n", b'path,label\n"a,cat\n'])
def test_what_is_no_csv_file(tree, tmp_path, content):
    if content:
        (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"--labels .*a\.csv (cannot be read|is no CSV file in UTF-8): "):
        data.load("folder", tree, 0, labels=tmp_path / "a.csv")


def test_labels_are_for_folders():
    with pytest.raises(UserError, match="--labels is for --dataset folder"):
        data.load("digits", None, 0, labels="a.csv")


@pytest.mark.slow
def test_runs_with_labels_are_resumed_refined_and_tested_on_the_same_images(tree, tmp_path):
    """One epoch of the smallest network; a label that changes is noticed, and so is another file."""
    for name in ("train", "val", "test"):
        shutil.copytree(tree / name, tmp_path / "images" / name)
    rows, job = rows_of(tree), tmp_path / "job"
    labels = write(tmp_path / "a.csv", ("path", "label", "split"), rows)
    place = ("--data_dir", tmp_path / "images", "--labels", labels)
    flags = ("--dataset", "folder", "--teacher_model", "resnet_20", "--method", "scratch", "--train_batch_size", 8)
    succeed("main.py", *flags, *place, "--num_epochs", 1, "--job_dir", job)
    (exported,) = job.glob("*_pruned_*.pt")
    assert content_of(exported)["meta"]["config"]["labels"] == str(labels)

    tested = succeed("finetune.py", "--refine", exported, "--pruned", "--test_only")
    assert tested.replace(str(exported), "student 1") == succeed("main.py", "--test_only", "--job_dir", job, "--resume")

    path, label, split = next(row for row in rows if row[2] == "train")
    write(labels, ("path", "label", "split"), [row for row in rows if row[0] != path])
    resume = (*flags, *place, "--num_epochs", 2, "--job_dir", job, "--resume")
    assert "other training images (20, now 19)" in fail("main.py", *resume)
    other = {"cat": "dog", "dog": "cat"}[label]
    write(labels, ("path", "label", "split"), [*(row for row in rows if row[0] != path), (path, other, split)])
    assert "was trained with other training images" in fail("main.py", *resume)
    write(labels, ("path", "label", "split"), rows[::-1])
    succeed("main.py", *resume)


def test_refining_takes_the_labels_from_the_file_unless_the_folder_is_another():
    content = meta()
    content["config"] |= {"dataset": "folder", "data_dir": "set", "labels": "a.csv"}
    described = from_plain(Meta, content)
    for typed, expected in (((), "a.csv"), (("--data_dir", "other"), None), (("--labels", "b.csv"), "b.csv")):
        given = options.parse("finetune", ["--refine", "a.pt", *typed])
        assert options.for_refinement(given, described).labels == (expected and Path(expected))
