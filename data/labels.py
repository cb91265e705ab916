"""Classes of image files from a CSV file."""

import csv
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.sources import stratified_split
from data.tree import SPLITS, Found
from utils.errors import UserError

LAYOUT = "expected rows of train and of test (or val), of at least two labels"
HELD_OUT = 5  # without the column split, one image of so many is a test image


class Row(NamedTuple):
    """An image; `use` is None in a file without the column split."""

    line: int
    path: str
    label: str
    use: str | None


def labeled_files(root: Path, file: Path) -> Found:
    """The image files that a CSV file names, with their labels as classes.

    Its columns are `path` (below root, or absolute), `label`, and optionally `split` (train, test or val); others are
    ignored. Without `split`, a fifth of the images, stratified and always the same, is the test set.

    Raises:
        UserError: the file cannot be read, lacks a column or a split, or a row is not complete, names a missing file,
            or the file of another row.
    """
    rows = _read(root, file)
    lines: dict[str, int] = {}
    for row in rows:
        if lines.setdefault(row.path, row.line) != row.line:
            raise UserError(f"{file}, line {row.line}: {row.path} is in line {lines[row.path]}, too: keep one of them")
        if not os.path.isfile(row.path):
            raise UserError(f"{file}, line {row.line}: {row.path} does not exist; paths are below --data_dir")
    remarks = []
    if rows[0].use is None:
        rows.sort(key=lambda row: (row.label, row.path))
        _, targets = np.unique([row.label for row in rows], return_inverse=True)
        held_out, _ = stratified_split(targets, len(rows) // HELD_OUT)
        rows = [row._replace(use="train") for row in rows]
        for index in held_out:
            rows[index] = rows[index]._replace(use="test")
        remarks = [f"{file} has no column split: a fifth of the images, {len(held_out):,}, are the test set."]
    files: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        files.setdefault(row.use, {}).setdefault(row.label, []).append(row.path)
    if "train" not in files or len(files) == 1:
        raise UserError(f"{file} has {' and '.join(files)} rows alone: {LAYOUT}")
    return Found(files, {use: f"{file} (split {use})" for use in files}, LAYOUT, remarks)


def _read(root: Path, file: Path) -> list[Row]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if missing := [name for name in ("path", "label") if header.count(name) != 1]:
                raise UserError(
                    f"{file} needs one column {missing[0]}, but its first line names {', '.join(header) or 'none'}: "
                    "the columns are path, label, and optionally split"
                )
            cells = ((reader.line_num, dict(zip(header, row, strict=False))) for row in reader if any(row))
            rows = [_row(root, file, line, values, "split" in header) for line, values in cells]
    except OSError as error:
        raise UserError(f"--labels {file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {file} is no CSV file in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{file} has no rows: {LAYOUT}")
    return rows


def _row(root: Path, file: Path, line: int, values: dict[str, str], has_split: bool) -> Row:
    path, label, split = (values.get(name, "").strip() for name in ("path", "label", "split"))
    if not path or not label:
        raise UserError(f"{file}, line {line}: the {'label' if path else 'path'} is missing")
    if len(label) > 255 or any(ord(character) < 32 for character in label):
        raise UserError(f"{file}, line {line}: a label is one line of at most 255 characters, not {label[:40]!r}")
    use = SPLITS.get(split.lower())
    if has_split and not use:
        raise UserError(f"{file}, line {line}: the split is {split!r}, not one of {', '.join(SPLITS)}")
    return Row(line, os.path.normpath(root / path), label, use if has_split else None)
