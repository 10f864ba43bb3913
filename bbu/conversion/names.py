"""Names of photos, and of the photos that are written, whatever bytes a vendor's file names hold."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from bbu.schema import MAX_NAME_BYTES, MAX_PATH_BYTES

OUTPUT_SUFFIX = ".jpeg"
_MAX_OUTPUT_BYTES = MAX_PATH_BYTES * 3 // 4
"""Of a written photo's path below image_folder, which needs some bytes too."""
_HASH_LENGTH = 8


def printable_path(path: str) -> str:
    r"""Write a path, as the system names it, as valid text.

    A part that is not UTF-8 is read as GBK, in which Chinese Windows packs archives, where that gives readable text;
    elsewhere its other bytes are written as `\xb5`.
    """
    return "/".join(map(_printable_part, path.split("/")))


def escaped_path(path: str) -> str:
    r"""Write a path, as the system names it, so that its bytes can be seen: those that are not UTF-8 as `\xb5`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def matching_key(path: str) -> str:
    """Return what all spellings of a path have in common, whatever their Unicode form or encoding."""
    return unicodedata.normalize("NFC", printable_path(path))


def is_rewritten(path: str) -> bool:
    """Whether the printable form of a path differs from the path."""
    return os.fsencode(path) != printable_path(path).encode()


def unique_names(stems: Sequence[str]) -> list[str]:
    """Name photos by their stems: each its printable stem, with a hash where that is the name of another one.

    Args:
        stems: distinct paths, as the system names them.
    """
    names = {stem: stem for stem in stems if not is_rewritten(stem)}
    taken = set(names)
    for stem in sorted(set(stems) - taken, key=os.fsencode):
        names[stem] = _first_free(printable_path(stem), os.fsencode(stem), taken.__contains__)
        taken.add(names[stem])
    return [names[stem] for stem in stems]


def output_paths(names: Sequence[str]) -> list[str]:
    """Choose the path of each written photo: below the folder of images, without suffix.

    It is the photo's name, unless a file system could not hold that: too long, the same as another one where capitals
    or Unicode forms do not count, or the name of a folder that another photo needs.

    Args:
        names: distinct names of photos.
    """
    paths = {name: _shorten(name) for name in names}
    folders = {_file_key(folder) for path in paths.values() for folder in _folders_of(path)}
    taken: set[str] = set()

    def is_taken(path: str) -> bool:
        return _file_key(path) in taken or _file_key(path + OUTPUT_SUFFIX) in folders

    for name in sorted(names):
        paths[name] = _first_free(paths[name], name.encode(), is_taken)
        taken.add(_file_key(paths[name]))
    return [paths[name] for name in names]


def _printable_part(part: str) -> str:
    raw = os.fsencode(part)
    for encoding in ("utf-8", "gbk"):
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "utf-8" or text.isprintable():
            return text
    return escaped_path(part)


def _first_free(path: str, identity: bytes, is_taken: Callable[[str], bool]) -> str:
    """The path itself, or one of its length at most that ends in a hash of `identity`."""
    while is_taken(path):
        path = _with_hash(path, identity)
        identity += b"~"
    return path


def _shorten(name: str) -> str:
    *folders, last = name.split("/")
    last = _shorten_part(last, OUTPUT_SUFFIX)
    path = "/".join([*(_shorten_part(part, "") for part in folders), last])
    return path if len(path.encode()) <= _MAX_OUTPUT_BYTES else _with_hash(last, name.encode())


def _shorten_part(part: str, suffix: str) -> str:
    return part if len((part + suffix).encode()) <= MAX_NAME_BYTES else _with_hash(part, part.encode())


def _with_hash(path: str, identity: bytes) -> str:
    """A path whose last part is cut where necessary and ends in `~` and a hash."""
    folder, slash, last = path.rpartition("/")
    room = MAX_NAME_BYTES - _HASH_LENGTH - 1 - len(OUTPUT_SUFFIX)
    start = last.encode()[:room].decode(errors="ignore")
    return f"{folder}{slash}{start}~{hashlib.sha256(identity).hexdigest()[:_HASH_LENGTH]}"


def _folders_of(path: str) -> Iterable[str]:
    parts = path.split("/")[:-1]
    return ("/".join(parts[: count + 1]) for count in range(len(parts)))


def _file_key(path: str) -> str:
    """What is equal for two paths that a file system may take for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
