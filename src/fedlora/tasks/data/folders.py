"""Images in folders named after their classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedlora.core.errors import DataError
from fedlora.core.later import datasets

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Endings of the files that count as pictures, in small letters or large."""

_JUNK = frozenset({"Thumbs.db", "desktop.ini"})


def picture_folders(root: Path) -> tuple[Path, Path | None]:
    """Where the training pictures lie, and where those for testing, None if they are to be held out.

    Args:
        root: a folder of classes, or of ``train`` and maybe ``test`` that are folders of classes.
    """
    train, test = root / "train", root / "test"
    # a class may be called "train" too; then its pictures lie in it directly
    if not class_folders(train):
        return root, None
    return train, test if class_folders(test) else None


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, sorted, hidden ones left out; none where there is no such folder."""
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def read_folder(root: Path, names: Sequence[str] | None = None) -> datasets.Dataset:
    """Pictures and their classes.

    Args:
        root: its folders are the classes; a class's pictures may lie in folders of their own.
        names: the classes' names; those of the folders with pictures where None.

    Returns:
        Rows by class, then by path: ``image`` (the path), ``label``, and ``file`` (the path within ``root``).

    Raises:
        DataError: there is no such folder, or no picture in it, or a class that is not among ``names``.
    """

    if not root.is_dir():
        raise DataError(f"there is no folder '{root}', but images were to be read from it: correct the path")
    found = {name: _pictures(root / name) for name in class_folders(root)}
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise DataError(
            f"'{root}' has no folders with images, but each class needs one: put images "
            f"({', '.join(sorted(PICTURES))}) into {root}/CLASS/"
        )
    names = list(found) if names is None else list(names)
    unknown = sorted(found.keys() - set(names))
    if unknown:
        raise DataError(
            f"'{root}' has {len(unknown)} classes that no training image has (such as {unknown[0]!r}), but a "
            "class must be seen to be learned: add training images of it or remove these"
        )
    rows = [(path, names.index(name)) for name, paths in found.items() for path in paths]
    features = datasets.Features(
        image=datasets.Value("string"), label=datasets.ClassLabel(names=names), file=datasets.Value("string")
    )
    columns = {
        "image": [str(path) for path, _ in rows],
        "label": [label for _, label in rows],
        "file": [path.relative_to(root).as_posix() for path, _ in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def left_out(root: Path) -> list[str]:
    """Sentences about what a folder of classes, or of ``train`` and ``test``, holds beside what is read."""
    train, test = picture_folders(root)
    notes = []
    if train != root:
        read = {"train", "test"} if test else {"train"}
        beside = [repr(name) for name in class_folders(root) if name not in read and _pictures(root / name)]
        notes += [f"images in {', '.join(beside[:5])} beside 'train' are not read"] if beside else []
    return [*notes, *(note for folder in (train, test) if folder for note in _left_out_of(folder))]


def _left_out_of(folder: Path) -> list[str]:
    """The same about a folder of classes."""
    notes, classes = [], class_folders(folder)
    stray = sum(_is_picture(entry.name) for entry in folder.iterdir() if entry.is_file())
    if stray:
        notes.append(f"{stray} images beside the folders of classes in '{folder}' are not read")
    if empty := [repr(name) for name in classes if not _pictures(folder / name)]:
        notes.append(f"no images are in {', '.join(empty[:5])} of '{folder}', which are no classes")
    names = [name for one in classes for _, _, files in os.walk(folder / one) for name in files]
    others = [name for name in names if not (_is_picture(name) or name.startswith(".") or name in _JUNK)]
    if others:
        endings = sorted({Path(name).suffix or name for name in others})
        notes.append(f"{len(others)} files in '{folder}' are no images of a known kind: {', '.join(endings[:5])}")
    return notes


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURES and not name.startswith(".")


def _pictures(folder: Path) -> list[Path]:
    return sorted(Path(inside, name) for inside, _, files in os.walk(folder) for name in files if _is_picture(name))
