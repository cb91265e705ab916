"""Classes of image files from a CSV file."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from data.sources import DataSet, of_files, stratified_split
from data.tree import SPLITS
from utils.errors import UserError

LAYOUT = "expected rows of train and of test (or val), of at least two labels"
HELD_OUT = 5  # without the column split, one image of so many is a test image


def labeled_files(root: Path, file: Path) -> DataSet:
    """The data set of the image files that a CSV file names, with their labels as classes.

    Its columns are `path` (below root, or absolute), `label`, and optionally `split` (train, test or val); others are
    ignored. Without `split`, a fifth of the images, stratified and always the same, is the test set.

    Raises:
        UserError: the file cannot be read, lacks a column or a split, or a row is not complete, names a missing file,
            or the file of another row; as `of_files` does.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            rows = list(_rows(root, file, stream))
    except OSError as error:
        raise UserError(f"--labels {file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {file} is no CSV file in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{file} has no rows: {LAYOUT}")
    remarks = []
    if rows[0][2] is None:
        rows.sort()
        _, targets = np.unique([label for label, _, _ in rows], return_inverse=True)
        test = set(stratified_split(targets, len(rows) // HELD_OUT)[0].tolist())
        rows = [(label, path, "test" if i in test else "train") for i, (label, path, _) in enumerate(rows)]
        remarks = [f"{file} has no column split: a fifth of the images, {len(test):,}, are the test set."]
    files: dict[str, dict[str, list[str]]] = {}
    for label, path, use in rows:
        files.setdefault(use, {}).setdefault(label, []).append(path)
    if "train" not in files or len(files) == 1:
        raise UserError(f"{file} has {' and '.join(files)} rows alone: {LAYOUT}")
    return of_files("folder", files, {use: f"{file} (split {use})" for use in files}, LAYOUT, remarks)


def _rows(root: Path, file: Path, stream: TextIO) -> Iterator[tuple[str, str, str | None]]:
    """(label, path, use) of each row, which is checked; without the column split, use is None."""
    reader = csv.reader(stream, strict=True)
    header = [name.strip().lower() for name in next(reader, [])]
    if missing := [name for name in ("path", "label") if header.count(name) != 1]:
        raise UserError(
            f"{file} needs one column {missing[0]}, but its first line names {', '.join(header) or 'none'}: "
            "the columns are path, label, and optionally split"
        )
    lines: dict[str, int] = {}
    for cells in filter(any, reader):
        values, place = dict(zip(header, cells, strict=False)), f"{file}, line {reader.line_num}"
        path, label, split = (values.get(name, "").strip() for name in ("path", "label", "split"))
        use = SPLITS.get(split.lower())
        if not path or not label:
            raise UserError(f"{place}: the {'label' if path else 'path'} is missing")
        if len(label) > 255 or any(ord(character) < 32 for character in label):
            raise UserError(f"{place}: a label is one line of at most 255 characters, not {label[:40]!r}")
        if "split" in header and not use:
            raise UserError(f"{place}: the split is {split!r}, not one of {', '.join(SPLITS)}")
        path = os.path.normpath(root / path)
        if lines.setdefault(path, reader.line_num) != reader.line_num:
            raise UserError(f"{place}: {path} is in line {lines[path]}, too: keep one of them")
        if not os.path.isfile(path):
            raise UserError(f"{place}: {path} does not exist; paths are below --data_dir")
        yield label, path, use if "split" in header else None
