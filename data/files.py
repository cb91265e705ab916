"""Data sets of image files, from class folders or a CSV file, and notes on what is left out."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data.images import SkippedImages, extensions
from data.sources import DataSet, Split, stratified_split
from utils.errors import UserError
from utils.normalization import NORMALIZATIONS

TREE = "expected train/<class>/* and test/<class>/* (or val/<class>/*), or --labels FILE.csv"
ROWS = "expected rows of train and of test (or val), of at least two labels"
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}  # names and their use
HELD_OUT = 5  # without the column split, one image of so many is a test image


def classified_files(name: str, root: Path, uses: Sequence[str]) -> DataSet:
    """The data set of the image files below root/<split>/<class> for those of `uses` that exist.

    Names that begin with "." or "@" are left out, links to folders are followed, and valid/ and validation/ mean val/.

    Raises:
        UserError: a split is missing, has two folders, or has images but no class folders; as `_data_set` does.
    """
    folders, remarks = _split_folders(root, uses)
    files, others, all_loose = {}, [], []
    for use, folder in folders.items():
        files[use], loose = {}, []
        for entry in _visible(os.scandir(folder)):
            if _is_folder(entry):
                paths = list(_files_below(entry.path, {os.path.realpath(top) for top in (folder, *folder.parents)}))
                files[use][entry.name] = list(filter(is_image, paths))
                if use == "train" and paths and not files[use][entry.name]:
                    raise UserError(f"{entry.path} has no images that Pillow reads, only files such as {paths[0]}")
                others += [path for path in paths if not is_image(path)]
            else:
                (loose if is_image(entry.path) else others).append(entry.path)
        if loose and not files[use]:
            raise UserError(
                f"{folder} has images, but no class folders: move each image into a folder of its class, "
                f"{folder.name}/<class>/, or name the classes in a file (--labels FILE.csv)"
            )
        all_loose += loose
    if others:
        suffixes = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in others).most_common(5)
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes)
        remarks.append(
            f"Left out: {len(others):,} files that Pillow does not read as images ({counts}), such as {min(others)}."
        )
    if all_loose:
        remarks.append(f"Left out: {len(all_loose):,} images beside the class folders, such as {min(all_loose)}.")
    return _data_set(name, files, folders, TREE, remarks)


def labeled_files(root: Path, file: Path) -> DataSet:
    """The data set of the image files that a CSV file names, with their labels as classes.

    Its columns are `path` (below root, or absolute), `label`, and optionally `split` (train, test or val); others are
    ignored. Without `split`, a fifth of the images, stratified and always the same, is the test set.

    Raises:
        UserError: the file cannot be read, lacks a column or a split, or a row is not complete, names a missing file,
            or the file of another row; as `_data_set` does.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            rows = list(_rows(root, file, stream))
    except OSError as error:
        raise UserError(f"--labels {file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {file} is no CSV file in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{file} has no rows: {ROWS}")
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
        raise UserError(f"{file} has {' and '.join(files)} rows alone: {ROWS}")
    return _data_set("folder", files, {use: f"{file} (split {use})" for use in files}, ROWS, remarks)


def _data_set(
    name: str, files: dict[str, dict[str, list[str]]], places: dict[str, Any], layout: str, remarks: Sequence[str]
) -> DataSet:
    """A data set of image files, sorted by class and path, with ImageNet's normalization.

    Args:
        files: paths by use ("train", "test" or "val") and class. Without "test", "val" is the test set.
        places: for messages, by use: where the files are listed.
        layout: for messages: what is expected there.

    Raises:
        UserError: a split has no images or a class that train lacks, or classes are too few.
    """
    if "test" not in files:
        roles = {"train": "train", "val": "test"}
        files, places = ({roles[use]: by_use[use] for use in by_use} for by_use in (files, places))
    classes = sorted(files["train"])
    if len(classes) < 2:
        raise UserError(f"{places['train']} holds {len(classes)} class(es), at least 2 are needed: {layout}")
    splits = {}
    for use, by_class in files.items():
        if unknown := sorted(by_class.keys() - classes):
            raise UserError(f"{places[use]} has a class that train does not have: {unknown[0]}")
        if not any(by_class.values()):
            raise UserError(f"no images in {places[use]}: {layout}")
        lists = [sorted(by_class.get(name, [])) for name in classes]
        if use == "train" and not all(lists):
            empty = classes[lists.index([])]
            raise UserError(f"no images in {places[use]} of the class {empty}: add some that Pillow reads")
        # Bytes take a fraction of the memory of a million strings, and worker processes share them.
        paths = np.array([os.fsencode(path) for paths in lists for path in paths])
        splits[use] = Split(paths, np.repeat(np.arange(len(classes)), list(map(len, lists))))
    mean, std = NORMALIZATIONS["imagenet"]
    skipped = SkippedImages(sum(map(len, splits.values())))
    options = {"skipped": skipped, "remarks": remarks, "places": places}
    return DataSet(name, classes, **splits, mean=mean, std=std, padding=0, flip=True, **options)


def _split_folders(root: Path, uses: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The folder of each of `uses` that has one, and a note on folders beside them."""
    names = sorted(entry.name for entry in _visible(os.scandir(root)) if _is_folder(entry)) if root.is_dir() else []
    named = {use: [name for name in names if SPLITS.get(name) == use] for use in uses}
    for use, same in named.items():
        if len(same) > 1:
            raise UserError(f"{root} has {same[0]} and {same[1]}, which both mean {use}: rename or move one of them")
    folders = {use: root / same[0] for use, same in named.items() if same}
    if "train" not in folders:
        there = f", only {_listed(names)}" if names else ""
        raise UserError(f"{root} has no folder train{there}: {TREE}")
    if len(folders) == 1:
        raise UserError(f"{root} has neither test nor val, only {_listed(names)}: {TREE}")
    unused = [name for name in names if SPLITS.get(name) not in uses]
    return folders, [f"Not used: the folder(s) {_listed(unused)} beside train in {root}."] if unused else []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def is_image(path: str) -> bool:
    """Whether a file's extension is one of images that Pillow reads."""
    return os.path.splitext(path)[1].lower() in extensions()


def _visible(entries: Iterable[os.DirEntry]) -> Iterator[os.DirEntry]:
    return (entry for entry in entries if not entry.name.startswith((".", "@")))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _files_below(top: str, known: set[str]) -> Iterator[str]:
    """Visible files in a folder and the folders in it, also behind links.

    A real folder is read once, so that loops end.

    Args:
        known: real paths of folders that are not read; those read are added.
    """
    real = os.path.realpath(top)
    if real in known:
        return
    known.add(real)
    for entry in sorted(_visible(os.scandir(top)), key=lambda entry: entry.name):
        if _is_folder(entry):
            yield from _files_below(entry.path, known)
        else:
            yield entry.path


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
