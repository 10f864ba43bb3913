"""What a model folder says of its name and licence, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.reports.base_model import describe_base_model

QWEN = "---\nlicense_name: qwen-research\nlicense: other\nlicense_link: https://example.org/LICENSE\n---\n# Qwen\n"


def model_folder(parent: Path, name: str, card: str | None = None) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "hub_id", "licence"), [
    ("Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen-research"),
    ("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0"),
    ("models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/0a1b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen-research"),
    ("models--acme--vl-7b/snapshots/0a1b", "acme/vl-7b", "no licence"),
    ("model-tiny", None, "no licence"),
])  # fmt: skip
def test_a_folder_without_a_card_is_known_by_its_name(tmp_path: Path, name: str, hub_id: str | None, licence: str):
    base = describe_base_model(model_folder(tmp_path, name))
    assert base.hub_id == hub_id and licence in base.licence_text
    assert base.name == hub_id or base.name == "model-tiny"


def test_the_card_of_the_folder_has_the_word_on_its_licence(tmp_path: Path):
    folder = model_folder(tmp_path, "Qwen2.5-VL-7B-Instruct", QWEN)
    (folder / "LICENSE").write_text("the whole text")
    base = describe_base_model(folder)
    assert base.licence == {
        "license": "other", "license_name": "qwen-research", "license_link": "https://example.org/LICENSE",
    }  # fmt: skip
    assert base.licence_files == {"LICENSE": b"the whole text"}


def test_a_checkpoint_of_this_program_hands_its_base_on(tmp_path: Path):
    card = f"---\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct\ntags: [bbu]\n{QWEN[4:]}"
    base = describe_base_model(model_folder(tmp_path, "checkpoint-7", card))
    assert base.hub_id == "Qwen/Qwen2.5-VL-3B-Instruct" and base.licence["license_name"] == "qwen-research"


@pytest.mark.parametrize("card", [
    "", "# no front matter", "---\nlicense: mit", "---\n- a\n- list\n---\n", "---\nlicense: [mit]\n---\n",
    "---\n{" + "[" * 5000 + "\n---\n", "---\n\x00\n---\n", "---\nlicense: mit\ntags: 3\n--",
    "---\n a: b\n  c: d\n---\n", "---\nbase_model: [a, b]\n---\n", "---\nbase_model: a/b\ntags: 7\n---\n",
])  # fmt: skip
def test_a_card_that_cannot_be_used_is_passed_over(tmp_path: Path, card: str):
    assert describe_base_model(model_folder(tmp_path, "model", card)).licence == {"license": "unknown"}


def test_a_card_saved_on_windows_is_read(tmp_path: Path):
    folder = model_folder(tmp_path, "model")
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# Model\r\n")
    assert describe_base_model(folder).licence == {"license": "mit"}


def test_a_card_in_another_encoding_is_read_as_far_as_it_can_be(tmp_path: Path):
    folder = model_folder(tmp_path, "model")
    (folder / "README.md").write_bytes("---\nlicense: mit\n# 通信\n---\n".encode("gbk"))
    assert describe_base_model(folder).licence == {"license": "mit"}
