"""Listing a vendor's folder: every photo once, and every other file counted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bbu.conversion.listing import Listing, PhotoFiles, list_vendor_folder
from bbu.errors import DataError
from tests.conversion.vendor_folder import put

NFC, NFD = "caf\u00e9", "cafe\u0301"
GBK = "机房".encode("gbk")


def listing_of(folder: Path, *names: str | bytes) -> Listing:
    for name in names:
        put(folder, name)
    return list_vendor_folder(folder)


def pairs(listing: Listing) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    return {photo.name: (photo.records, photo.images) for photo in listing.photos}


def test_photos_are_listed_sorted_whatever_half_of_the_pair_is_there(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, "b.json", "a.JPG", "sub/c.jpeg", "b.jpeg")
    assert pairs(listing) == {
        "a": ((), ("a.JPG",)),
        "b": (("b.json",), ("b.jpeg",)),
        "sub/c": ((), ("sub/c.jpeg",)),
    }
    assert not listing.uncovered and not listing.renamed


@pytest.mark.parametrize("suffix", ["JPG", "Jpg", "jPeG", "JPEG"])
def test_suffixes_count_in_any_case(tmp_path: Path, suffix: str) -> None:
    assert pairs(listing_of(tmp_path, "a.JSON", f"a.{suffix}")) == {"a": (("a.JSON",), (f"a.{suffix}",))}


def test_two_files_for_one_half_are_both_listed(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, "a.json", "a.JSON", "a.jpg", "a.jpeg")
    assert pairs(listing) == {"a": (("a.JSON", "a.json"), ("a.jpeg", "a.jpg"))}


def test_files_of_no_photo_are_counted_by_suffix_or_reason(tmp_path: Path) -> None:
    names = ["a.json", "a.png", "b.PNG", "film.mp4", ".hidden.json", ".bin/a.jpeg"]
    names += ["notes", "x.not a suffix", "z.", "part.001"]
    (tmp_path / "dead.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.log")
    listing = listing_of(tmp_path, *names)
    assert listing.uncovered == {
        ".mp4": 1, ".png": 2, "dangling_link": 1, "hidden": 2, "no_suffix": 4, "special_file": 1,
    }  # fmt: skip
    assert listing.photos == (PhotoFiles("a", "a", ("a.json",), (), ("a.png",)),)


def test_what_cannot_be_read_as_a_photo_is_still_a_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpeg").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "b.json")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path may be no longer than 107 bytes
        server.bind("b.jpg")
    listing = listing_of(tmp_path, "a.json")
    assert pairs(listing) == {"a": (("a.json",), ("a.jpeg",)), "b": (("b.json",), ("b.jpg",))}
    assert listing.uncovered == {"dangling_link": 1}


def test_linked_folders_are_followed_and_each_folder_is_entered_once(tmp_path: Path) -> None:
    vendor = tmp_path / "vendor"
    put(tmp_path, "elsewhere/p.json")
    put(vendor, "real/q.json")
    for link, target in {"again": "elsewhere", "linked": "elsewhere", "real/loop": "vendor/real", "up": "."}.items():
        (vendor / link).symlink_to(tmp_path / target)
    (vendor / "0-link").symlink_to(vendor / "real")
    listing = list_vendor_folder(vendor)
    assert [photo.name for photo in listing.photos] == ["again/p", "real/q"]
    assert listing.uncovered == {"folder_listed_already": 4}


def test_linked_files_are_photos(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/p.json")
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor/q.json").symlink_to(tmp_path / "elsewhere/p.json")
    assert pairs(list_vendor_folder(tmp_path / "vendor")) == {"q": (("q.json",), ())}


def test_unreadable_folders_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir  # a test as root may read every folder

    def refuse(path: str):
        if os.path.basename(path).startswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    for name in ("a/p.json", "locked 1/p.json", "a/locked 2/p.json"):
        put(tmp_path, name)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError) as caught:
        list_vendor_folder(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all("permission denied" in line for line in lines)
    assert "locked 1" in str(caught.value) and "a/locked 2" in str(caught.value)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_folder_without_photos_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="vendor_dir") as caught:
        list_vendor_folder(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), (NFD, NFC), ("机房", GBK), (GBK, "机房")])
def test_halves_that_are_spelled_in_two_ways_are_one_photo(tmp_path: Path, one: str, other: str) -> None:
    listing = listing_of(tmp_path, os.fsencode(one) + b".json", os.fsencode(other) + b".jpg")
    (photo,) = listing.photos
    assert photo.name in (NFC, "机房") and photo.records and photo.images


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), ("机房", GBK)])
def test_photos_whose_names_are_spelled_in_two_ways_stay_two(tmp_path: Path, one: str, other: str | bytes) -> None:
    files = [os.fsencode(stem) + suffix for stem in (one, other) for suffix in (b".json", b".jpg")]
    listing = listing_of(tmp_path, *files)
    assert len({photo.name for photo in listing.photos}) == len({photo.output for photo in listing.photos}) == 2
    for photo in listing.photos:
        (record,), (image,) = photo.records, photo.images
        assert record.removesuffix(".json") == image.removesuffix(".jpg")
    assert len(listing.renamed) == 1


def test_halves_that_could_belong_to_two_photos_are_not_paired(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, f"{NFC}.json", f"{NFC}.jpg", f"{NFD}.json")
    assert sorted((len(photo.records), len(photo.images)) for photo in listing.photos) == [(1, 0), (1, 1)]


def test_a_name_that_is_not_utf_8_is_told_with_its_bytes(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, GBK + b".jpg", b"\xff\xfe.jpg")
    assert [photo.name for photo in listing.photos] == ["\\xff\\xfe", "机房"]
    assert listing.renamed == {"机房": "\\xbb\\xfa\\xb7\\xbf.jpg"} | {"\\xff\\xfe": "\\xff\\xfe.jpg"}
