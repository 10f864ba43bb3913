"""A result of one photo, the pair of lists that knows its results, and the line that says how it went."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from bbu.errors import DataError, ModelError
from bbu.inference.photos import Photo
from bbu.inference.results import DetectionLists, PhotoResult, Tally
from bbu.schema import BBUObject

OBJECTS = (BBUObject((1.04, 2, 30, 40), "标签贴纸"), BBUObject((-5, 2, 10**9, 40), "a\nb"))
GREY = Photo("a.png", Image.new("RGB", (100, 80), "grey"))
RESULT = PhotoResult("a.png", "head", "ok", OBJECTS, (0.5, 0.25), "objectness", 100, 80, photo=GREY)
FAILED = PhotoResult("b.png", "head", "failed", error="b.png: cannot be read (x)")


def test_the_lists_unpack_as_boxes_and_captions_and_know_their_results():
    pair = DetectionLists([RESULT, FAILED])
    boxes, captions = pair
    assert boxes == [RESULT.boxes, []] == pair.boxes and captions == [["标签贴纸", "a\nb"], []] == pair.captions
    assert pair.results == (RESULT, FAILED) and len(pair) == 2
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert other == pair and other.results == pair.results


def test_a_line_of_json_is_a_view_with_scores_and_how_it_went():
    line = json.loads(json.dumps(RESULT.to_dict()))
    assert line["images"] == ["a.png"] and (line["width"], line["height"]) == (100, 80)
    assert line["objects"][0] == {"bbox_2d": [1.0, 2, 30, 40], "desc": "标签贴纸", "score": 0.5}
    assert (line["source"], line["status"], line["score_source"]) == ("head", "ok", "objectness")
    failed = FAILED.to_dict()
    assert (failed["status"], failed["error"], failed["objects"]) == ("failed", "b.png: cannot be read (x)", [])


def test_a_result_draws_itself(tmp_path: Path):
    assert RESULT.draw().size == (800, 640), "a small photo is drawn enlarged"
    saved = RESULT.save(tmp_path / "new" / "a.png")
    with Image.open(saved) as picture:
        assert picture.getpixel((300, 300)) == (128, 128, 128)


def test_a_result_that_cannot_be_drawn_says_why():
    with pytest.raises(DataError, match="cannot be read"):
        FAILED.draw()
    forgotten = PhotoResult("photo 3", "head", "ok")
    with pytest.raises(ModelError, match=r"result\.draw\(image\)"):
        forgotten.draw()
    assert forgotten.draw(Image.new("RGB", (900, 900))).size == (900, 900)


def test_the_tally_says_in_one_line_how_it_went():
    truncated = PhotoResult("c", "answer", "truncated", rejected={"bad_box": 2})
    assert str(Tally([RESULT])) == "1 photos: 1 ok" and Tally([RESULT]).is_all_well
    tally = Tally([RESULT, truncated, truncated, FAILED])
    assert str(tally) == (
        "4 photos: 1 ok, 2 truncated, 1 failed; truncated answers end at generation_max_new_tokens; "
        "not usable in the answers: bad_box 4"
    )
    assert not tally.is_all_well and tally.failed == 1 and str(Tally()) == "0 photos"
