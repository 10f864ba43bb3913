"""Names of photos are text and unique, and so are those of written photos, in every file system."""

from __future__ import annotations

import json
import os
import unicodedata

import pytest

from bbu.conversion.names import OUTPUT_SUFFIX, matching_key, output_paths, printable_path, unique_names
from bbu.schema import parse_record

GBK = os.fsdecode("机房照片".encode("gbk"))
BROKEN = os.fsdecode(b"p\xff\xfe")
NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("path", "text"),
    [("a/b", "a/b"), (f"{GBK}/b", "机房照片/b"), (BROKEN, "p\\xff\\xfe"), (NFD, NFD), ("a\nb", "a\nb")],
)
def test_any_path_can_be_written_as_text(path: str, text: str) -> None:
    assert printable_path(path) == text


def test_spellings_of_one_path_have_one_key() -> None:
    assert matching_key(NFC) == matching_key(NFD) and matching_key(GBK) == matching_key("机房照片")


def test_names_are_unique_and_a_real_name_comes_first() -> None:
    escaped = "p\\xff\\xfe"
    stems = [GBK, "机房照片", BROKEN, escaped, NFC, NFD]
    names = unique_names(stems)
    assert len(set(names)) == len(stems) and names[1] == "机房照片" and names[3:] == [escaped, NFC, NFD]
    assert names[0].startswith("机房照片~") and names[2].startswith(f"{escaped}~")
    assert unique_names(stems[::-1]) == names[::-1]


def test_ordinary_names_are_those_of_the_written_photos() -> None:
    names = ["S1-1", "sub/S1-1", "机房/照片 1", "长" * 83, "a\nb", "a.b", NFD]
    assert output_paths(names) == names


@pytest.mark.parametrize(
    "name", ["长" * 85, "x" * 255, f"{'夹' * 85}/{'长' * 90}", "/".join(["夹" * 60] * 5), "\\xff" * 80], ids=len
)
def test_long_names_are_shortened_to_what_a_file_system_holds(name: str) -> None:
    others = [name[:-1] + letter for letter in "abc"]
    paths = output_paths([name, *others])
    assert len(set(paths)) == 4
    for path in paths:
        assert all(len(part.encode()) <= 255 for part in f"{path}{OUTPUT_SUFFIX}".split("/"))
        parse_record(json.dumps({"images": [f"images/{path}{OUTPUT_SUFFIX}"], "objects": []}), "here")
    assert output_paths([*others, name])[-1] == paths[0]


def test_written_photos_differ_where_capitals_and_accents_do_not_count() -> None:
    paths = output_paths(["IMG_1", "img_1", NFC, NFD, "Straße", "STRASSE", "site/1", "Site/1"])
    keys = {unicodedata.normalize("NFC", path).casefold() for path in paths}
    assert len(keys) == len(paths) and paths[0] == "IMG_1"


def test_a_written_photo_does_not_take_the_name_of_a_folder() -> None:
    photo, inside = output_paths(["a", "a.jpeg/b"])
    assert inside == "a.jpeg/b" and photo.startswith("a~")
