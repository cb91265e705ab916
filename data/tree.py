"""The image files of a tree, `train/<class>/*` and `test|val/<class>/*`, and notes on what is left out."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data.images import extensions
from data.sources import DataSet, of_files
from utils.errors import UserError

LAYOUT = "expected train/<class>/* and test/<class>/* (or val/<class>/*), or --labels FILE.csv"
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}  # names and their use


def classified_files(name: str, root: Path, uses: Sequence[str]) -> DataSet:
    """The data set of the image files below root/<split>/<class> for those of `uses` that exist.

    Names that begin with "." or "@" are left out, links to folders are followed, and valid/ and validation/ mean val/.

    Raises:
        UserError: a split is missing, has two folders, or has images but no class folders; as `of_files` does.
    """
    folders, remarks = _split_folders(root, uses)
    files, others, loose = {}, [], []
    for use, folder in folders.items():
        files[use] = {}
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
    if others:
        suffixes = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in others).most_common(5)
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes)
        remarks.append(
            f"Left out: {len(others):,} files that Pillow does not read as images ({counts}), such as {min(others)}."
        )
    if loose:
        remarks.append(f"Left out: {len(loose):,} images beside the class folders, such as {min(loose)}.")
    return of_files(name, files, folders, LAYOUT, remarks)


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
        raise UserError(f"{root} has no folder train{there}: {LAYOUT}")
    if len(folders) == 1:
        raise UserError(f"{root} has neither test nor val, only {_listed(names)}: {LAYOUT}")
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
