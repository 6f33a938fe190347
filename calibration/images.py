"""Pictures in a folder, one class per subfolder where there are subfolders.

Pictures of the classes take turns, so that the first of them show all classes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphfold.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder in the order in which they are read.

    Attributes:
        path: of the folder.
        files: the pictures.
        labels: numbers of their classes, None without subfolders.
        classes: names of the subfolders by label; their own numbers where all names are numbers.
    """

    path: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()


def find_images(path: Path) -> ImageFolder:
    """The pictures in a folder.

    Raises:
        DataError: there are none, or both beside subfolders of pictures and in them.
    """
    beside = _pictures(path)
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    inside = {folder: files for folder in folders if (files := _pictures(folder))}
    if beside and inside:
        first = next(iter(inside))
        raise DataError(
            f"the folder holds {len(beside)} pictures beside folders of pictures ({first.name})",
            where=str(path),
            hint="all in one folder, or one folder per class",
        )
    if inside:
        return _by_class(path, inside)
    if not beside:
        raise DataError(
            "the folder holds no pictures", where=str(path), hint=f"{', '.join(SUFFIXES)} are read"
        )
    return ImageFolder(path, tuple(beside))


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()
    )


def _by_class(path: Path, inside: dict[Path, list[Path]]) -> ImageFolder:
    names = [folder.name for folder in inside]
    is_numbered = all(name.isdecimal() for name in names)
    label_of = {name: int(name) if is_numbered else at for at, name in enumerate(names)}
    columns = [
        [(file, label_of[folder.name]) for file in files] for folder, files in inside.items()
    ]
    rounds = itertools.zip_longest(*columns)
    pairs = [pair for each in rounds for pair in each if pair is not None]
    return ImageFolder(
        path,
        tuple(file for file, _ in pairs),
        tuple(label for _, label in pairs),
        tuple(names),
    )


def open_image(file: Path) -> Image:
    """A picture, upright.

    Raises:
        DataError: it cannot be read, or Pillow is not installed.
    """
    pillow = require_pillow()
    try:
        with pillow.open(file) as image:
            image.load()
            upright: Image = _upright(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"is no picture that can be read: {error}", where=str(file)) from None
    if upright.mode.startswith(("I", "F")):
        raise DataError(
            f"has values of more than 8 bits (mode {upright.mode})",
            where=str(file),
            hint="convert it, or give an .npz",
        )
    return upright


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def require_pillow() -> Any:
    """The module that reads pictures.

    Raises:
        DataError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            "pictures are read by Pillow, which is not installed",
            hint="pip install 'graphfold[images]'",
        ) from None
    return Image
