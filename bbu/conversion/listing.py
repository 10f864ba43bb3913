"""Lists a vendor's folder, once: which files make which photo, and which files no rule covers.

A photo is a JSON and a JPEG of one stem in one folder. Suffixes count in any case. Stems that differ in their Unicode
form (NFC, NFD) or encoding (UTF-8, GBK) alone are one photo where that leaves no choice. Links to folders are followed.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bbu.conversion.names import escaped_path, is_rewritten, matching_key, output_paths, printable_path, unique_names
from bbu.errors import DataError

_RECORD_SUFFIXES, _IMAGE_SUFFIXES = (".json",), (".jpeg", ".jpg")
_MAX_SUFFIX_LENGTH = 10
"""Of a suffix that is counted apart; what is longer is no suffix, but a name with a dot."""


@dataclass(frozen=True)
class PhotoFiles:
    """The files of one photo."""

    name: str
    """Its unique name, as valid text: the path below the vendor folder, without suffix."""
    output: str
    """Path of the written photo, below the folder of images, without suffix; unique in any file system."""
    records: tuple[str, ...]
    """Paths of its JSON below the vendor folder, as the system names them; a usable photo has one."""
    images: tuple[str, ...]
    """Paths of its JPEG, likewise."""
    others: tuple[str, ...] = ()
    """Printable names of files with its stem and another suffix, where it has no JPEG."""


@dataclass(frozen=True)
class Listing:
    """What lies in a vendor's folder."""

    photos: tuple[PhotoFiles, ...]
    """All photos, sorted by name."""
    uncovered: dict[str, int]
    """Suffix or reason → files and links that are part of no photo."""
    renamed: dict[str, str]
    """Written photo, as `output` → the path of its file, where that is written in another way or was shortened."""


def list_vendor_folder(folder: Path) -> Listing:
    """List the photos of a vendor's folder and of all folders below it.

    Raises:
        DataError: it is no folder, it holds no photo, or a folder in it cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"vendor_dir {folder} is not a folder; correct it, or draw one with `python -m bbu.demo`")
    walk = _Walk(folder)
    walk.run()
    if walk.problems:
        raise DataError("\n".join(walk.problems))
    photos = _name_photos(_group_files(walk.paths))
    if not photos:
        raise DataError(f"vendor_dir {folder} holds no .json, .jpeg or .jpg; correct vendor_dir")
    return Listing(tuple(photos), dict(sorted(walk.uncovered.items())), _renamed_photos(photos))


class _Walk:
    """A walk that enters each folder once, those behind links last, so that a file is listed at its real place."""

    def __init__(self, top: Path) -> None:
        self.paths: list[str] = []
        """Files of photos and those beside them, relative to `top`."""
        self.uncovered: Counter[str] = Counter()
        """Suffix or reason → files and links that are part of no photo."""
        self.problems: list[str] = []
        """Folders that cannot be read, one line each."""
        self._top = os.fspath(top)
        self._real_top = os.path.realpath(top)
        self._entered: set[tuple[int, int]] = set()
        """Device and inode of each folder that was entered."""
        self._folders = [""]
        self._linked_folders: list[str] = []

    def run(self) -> None:
        while self._folders or self._linked_folders:
            if not self._folders:
                self._linked_folders.sort(reverse=True)
                self._folders.append(self._linked_folders.pop())
            self._enter(self._folders.pop())

    def _enter(self, folder: str) -> None:
        path = os.path.join(self._top, folder)
        try:
            if self._is_listed(path):
                self.uncovered["folder_listed_already"] += 1
                return
            with os.scandir(path) as entries:
                for entry in entries:
                    self._visit(entry, os.path.join(folder, entry.name))
        except OSError as error:
            if _is_hidden(folder):  # such as a desktop's bin on a shared disk
                self.uncovered["hidden"] += 1
                return
            reason = (error.strerror or str(error)).lower()
            self.problems.append(f"folder {printable_path(path)!r}: {reason}; make it readable, or take it out")

    def _is_listed(self, path: str) -> bool:
        """Whether a folder was entered before, or holds the one in which the walk began. Else it counts as entered."""
        facts = os.stat(path)
        identity = facts.st_dev, facts.st_ino
        is_above = bool(self._entered) and self._real_top.startswith(os.path.join(os.path.realpath(path), ""))
        if is_above or identity in self._entered:
            return True
        self._entered.add(identity)
        return False

    def _visit(self, entry: os.DirEntry[str], path: str) -> None:
        kind = _kind_of(entry)
        if kind == "folder":
            (self._linked_folders if entry.is_symlink() else self._folders).append(path)
        elif _is_hidden(path):
            self.uncovered["hidden"] += 1
        else:
            self.paths.append(path)
            if kind == "dangling_link" or not _is_covered(path):
                self.uncovered[_suffix_group(path) if kind == "file" else kind] += 1


def _kind_of(entry: os.DirEntry[str]) -> str:
    """What an entry is, or what a link leads to: folder, file, special_file or dangling_link."""
    try:
        mode = os.stat(entry.path).st_mode if entry.is_symlink() else None
    except OSError:
        return "dangling_link"
    if entry.is_dir() if mode is None else stat.S_ISDIR(mode):
        return "folder"
    return "file" if (entry.is_file() if mode is None else stat.S_ISREG(mode)) else "special_file"


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split(os.sep))


def _split_suffix(path: str) -> tuple[str, str]:
    """(path without suffix, suffix in small letters) of a file that is not hidden."""
    folder, name = os.path.split(path)
    stem, dot, suffix = name.rpartition(".")
    return (os.path.join(folder, stem), f".{suffix.lower()}") if dot else (path, "")


def _is_covered(path: str) -> bool:
    return _split_suffix(path)[1] in (*_RECORD_SUFFIXES, *_IMAGE_SUFFIXES)


def _suffix_group(path: str) -> str:
    """The suffix under which a file is counted."""
    suffix = escaped_path(_split_suffix(path)[1])
    is_one = len(suffix) <= _MAX_SUFFIX_LENGTH and suffix.isprintable() and any(map(str.isalpha, suffix))
    return suffix if is_one else "no_suffix"


def _group_files(paths: Iterable[str]) -> list[PhotoFiles]:
    """Put the files of each photo together; `name` and `output` are still the stem as the system names it."""
    groups: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(paths):
        stem, _ = _split_suffix(path)
        groups[matching_key(stem)][stem].append(path)
    return [photo for stems in groups.values() for photo in _pair_halves([_of_stem(*item) for item in stems.items()])]


def _of_stem(stem: str, paths: Sequence[str]) -> PhotoFiles:
    records = tuple(path for path in paths if _split_suffix(path)[1] in _RECORD_SUFFIXES)
    images = tuple(path for path in paths if _split_suffix(path)[1] in _IMAGE_SUFFIXES)
    others = tuple(printable_path(os.path.basename(path)) for path in paths if not _is_covered(path))
    return PhotoFiles(stem, stem, records, images, () if images else others)


def _pair_halves(stems: Sequence[PhotoFiles]) -> list[PhotoFiles]:
    """Join a JSON and a JPEG whose stems are spelled in two ways, where there is one of each without a partner."""
    whole = [each for each in stems if each.records and each.images]
    records = [each for each in stems if each.records and not each.images]
    images = [each for each in stems if each.images and not each.records]
    if len(records) == len(images) == 1:
        stem = min(records[0].name, images[0].name, key=lambda stem: stem != matching_key(stem))
        return [*whole, PhotoFiles(stem, stem, records[0].records, images[0].images)]
    return [*whole, *records, *images]


def _name_photos(photos: Sequence[PhotoFiles]) -> list[PhotoFiles]:
    names = unique_names([photo.name for photo in photos])
    outputs = output_paths(names)
    named = [replace(photo, name=n, output=o) for photo, n, o in zip(photos, names, outputs, strict=True)]
    return sorted(named, key=lambda photo: photo.name)


def _renamed_photos(photos: Iterable[PhotoFiles]) -> dict[str, str]:
    files = {photo.output: (photo.images or photo.records)[0] for photo in photos}
    return {
        output: escaped_path(file)
        for output, file in files.items()
        if is_rewritten(file) or _split_suffix(file)[0] != output
    }
