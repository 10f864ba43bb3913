"""What a generated answer becomes: every complete object, nothing invented, every rejection counted."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bbu.inference.parse import parse_answer
from bbu.schema import BBUObject

OBJECTS = [
    {"bbox_2d": [10, 20, 110, 220], "desc": "螺丝连接点/BBU安装螺丝/连接正确"},
    {"bbox_2d": [0, 0, 28.5, 28], "desc": '标签 with "quotes", {braces} [brackets] and \\ backslash'},
    {"bbox_2d": [5, 6, 7, 8], "desc": 'as text: {"bbox_2d": [1, 2, 3, 4], "desc": "x"}'},
]


def expected_objects(data: list[dict]) -> tuple[BBUObject, ...]:
    return tuple(BBUObject(tuple(float(c) for c in o["bbox_2d"]), o["desc"].strip()) for o in data)


def ends_of_objects(data: list[dict], text: str) -> list[int]:
    """Where each object of `data` is complete in `text`, computed from what was written."""
    ends, position = [], 0
    for item in data:
        written = json.dumps(item, ensure_ascii=False)
        position = text.index(written, position) + len(written)
        ends.append(position)
    return ends


def check_every_cut(data: list[dict]) -> None:
    """Cut the answer at each position: every complete object is parsed, and no other."""
    text = json.dumps(data, ensure_ascii=False)
    ends = ends_of_objects(data, text)
    for cut in range(len(text)):
        complete = sum(end <= cut for end in ends)
        answer = parse_answer(text[:cut], finished=False)
        assert answer.objects == expected_objects(data[:complete]), text[:cut]
        assert answer.status == "truncated"


def test_a_complete_answer_is_parsed_in_order():
    answer = parse_answer(json.dumps(OBJECTS, ensure_ascii=False), finished=True)
    assert (answer.objects, answer.status, answer.rejected) == (expected_objects(OBJECTS), "ok", {})


def test_an_answer_cut_anywhere_keeps_every_complete_object_and_invents_none():
    check_every_cut(OBJECTS)


boxes = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500), st.integers(1, 500)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
descriptions = st.text(alphabet='abc螺丝/[]{}",:\\\n 12', max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"bbox_2d": boxes, "desc": descriptions}), min_size=1, max_size=4))
def test_any_list_of_objects_cut_anywhere_obeys_the_same_rule(data: list[dict]):
    check_every_cut(data)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='[]{}":,0123ab \\\n-e.', max_size=60), st.booleans())
def test_no_text_raises(text: str, finished: bool):
    parse_answer(text, finished=finished)


def test_an_empty_list_is_a_valid_answer():
    assert parse_answer("[]", finished=True).status == "ok"


def test_a_code_fence_and_words_around_the_list_do_no_harm():
    text = "好的 [见下]：\n```json\n" + json.dumps(OBJECTS, indent=1) + "\n```\n以上。"
    answer = parse_answer(text, finished=True)
    assert (answer.objects, answer.status) == (expected_objects(OBJECTS), "ok")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"bbox_2d": boxes, "desc": descriptions}), max_size=4), st.booleans())
def test_words_around_a_list_of_any_objects_change_no_object_and_no_place(data: list[dict], escaped: bool):
    text, words = json.dumps(data, ensure_ascii=escaped), "好的："
    plain, among_words = (parse_answer(t, finished=True, width=300, height=300) for t in (text, words + text + "。"))
    assert (plain.objects, plain.status, plain.rejected) == (
        among_words.objects, among_words.status, among_words.rejected,
    )  # fmt: skip
    places = [span and (span[0] + len(words), span[1] + len(words)) for span in plain.spans]
    assert places == list(among_words.spans)


def test_objects_written_after_the_end_of_the_list_are_counted_not_used():
    text = json.dumps(OBJECTS[:1]) + json.dumps(OBJECTS[:2])
    answer = parse_answer(text, finished=True)
    assert (answer.objects, answer.rejected) == (expected_objects(OBJECTS[:1]), {"after_the_list": 2})


@pytest.mark.parametrize("text", ["", "没有", "12", "{", "[{"])
def test_text_without_objects_is_unparsed_when_finished_and_truncated_when_not(text: str):
    assert parse_answer(text, finished=True).status == "unparsed"
    assert parse_answer(text, finished=False).status == "truncated"


MALFORMED = '[{"bbox_2d": [1, 2, 3, 4], "desc": "a"}, {bbox_2d: [5, 6, 7, 8], "desc": "b"}]'


def test_malformed_text_is_repaired_and_flagged_only_when_the_model_ended_it():
    first, second = BBUObject((1, 2, 3, 4), "a"), BBUObject((5, 6, 7, 8), "b")
    finished, cut = parse_answer(MALFORMED, finished=True), parse_answer(MALFORMED, finished=False)
    assert (finished.objects, finished.status) == ((first, second), "repaired")
    assert (cut.objects, cut.status, cut.rejected) == ((first,), "truncated", {"incomplete": 1})


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ('{"bbox_2d": [1, 2, 3], "desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, NaN], "desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, Infinity], "desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, true], "desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, 1' + "0" * 400 + '], "desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, ' + "4" * 5000 + '], "desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, 1e999], "desc": "a"}', "bad_box"),
        ('{"bbox_2d": "1 2 3 4", "desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, 4], "desc": "\\ud83d"}', "no_text"),
        ('{"desc": "a"}', "bad_box"),
        ('{"bbox_2d": [1, 2, 3, 4]}', "no_description"),
        ('{"bbox_2d": [1, 2, 3, 4], "desc": " "}', "no_description"),
        ('{"bbox_2d": [3, 2, 1, 4], "desc": "a"}', "empty_box"),
        ('{"bbox_2d": [1, 2, 1, 4], "desc": "a"}', "empty_box"),
        ('{"bbox_2d": [100, 2, 120, 4], "desc": "a"}', "outside_image"),
        ('{"bbox_2d": [-9, 2, 0, 4], "desc": "a"}', "outside_image"),
        ('{"bbox_2d": [1, 2, 3, 4], "desc": "a", "desc": "b"}', "not_an_object"),
        ('{"bbox_2d": [1, 2, 3, 4], "\\u0062box_2d": [1, 2, 3, 4], "desc": "a"}', "not_an_object"),
        ('{"bbox_2d": [1, 2, 3, 4], "desc": "a", "more": 1, "more": 2}', "not_an_object"),
    ],
)
def test_an_unusable_object_is_rejected_with_its_reason_and_the_rest_stays(written: str, reason: str):
    text = f'[{written}, {{"bbox_2d": [1, 2, 3, 4], "desc": "usable"}}]'
    answer = parse_answer(text, finished=True, width=100, height=100)
    assert answer.rejected == {reason: 1}
    assert [o.desc for o in answer.objects] == ["usable"]


def test_a_box_partly_outside_stays_as_written():
    text = '[{"bbox_2d": [90, 90, 120, 99], "desc": "a"}]'
    answer = parse_answer(text, finished=True, width=100, height=100)
    assert answer.objects[0].bbox_2d == (90, 90, 120, 99)


@pytest.mark.parametrize(
    "text",
    [
        # The box of one object, the description of another.
        '[{"bbox_2d": [1, 2, 3, 4], "desc": "a", 9{"bbox_2d": [5, 6, 7, 8], "desc": "b"}]',
        '[{"bbox_2d": [1, 2, 3, 4], "desc": "abbox_2d": [5, 6, 7, 8], "desc": "b"}]',
        # A description that runs on into the next object.
        '[{"bbox_2d": [1, 2, 3, 4], "desc": "q \\"u" [5, 6, 7, 8], "desc" "b"}]',
        # A box that the model ended in the middle.
        '[{"bbox_2d": [1, 2, 3',
    ],
)
def test_a_repair_never_joins_two_objects_or_completes_one(text: str):
    answer = parse_answer(text, finished=True)
    assert (answer.objects, answer.status) == ((), "unparsed") and sum(answer.rejected.values()) == 1


def test_a_defect_in_one_object_does_not_reach_the_next():
    text = '[{"bbox_2d": [1, 2, 3, 4], "desc": a"b"}, {"bbox_2d": [5, 6, 7, 8], "desc": "b"}]'
    assert BBUObject((5, 6, 7, 8), "b") in parse_answer(text, finished=True).objects


OBJECT = '{"bbox_2d": [1, 2, 3, 4], "desc": "a"}'
HOSTILE = {
    "opening brackets": "[" * 100_000,
    "opening braces": "{" * 100_000,
    "lists in a box": '[{"bbox_2d": ' + "[" * 100_000,
    "closed lists in a box": '[{"bbox_2d": ' + "[" * 100_000 + "]" * 100_000 + "}]",
    "objects in objects": '[{"a":' * 100_000,
    "braces and quotes": '{"' * 100_000,
    "brackets with spaces": "[ " * 100_000,
    "quotes": '[{"' + '"' * 1_000_000,
    "backslashes": '[{"' + "\\" * 1_000_000,
    "escaped quotes": '[{"' + '\\"' * 500_000,
    "digits": '[{"bbox_2d": [' + "9" * 1_000_000,
    "letters": "[{" + "a" * 1_000_000,
    "slashes": "[{" + "/" * 1_000_000,
    "code fences": "[{" + "```json" * 100_000,
    "spaces": "[{" + " " * 1_000_000 + "x",
    "brace and spaces": "[" + "} " * 100_000 + "}" + " " * 1_000_000,
    "keys": "[{" + '"a" ' * 200_000,
    "cut objects": '[{"bbox_2d": [1, 2, 3, ' * 50_000,
    "objects without an end": "[" + (OBJECT[:-1] + ",") * 10_000,
    "objects without commas": "[" + OBJECT * 10_000,
    "objects behind the list": "[" + OBJECT + "]" + OBJECT * 10_000,
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_time_for_any_text_is_bounded(text: str, finished: bool):
    started = time.process_time()
    answer = parse_answer(text, finished=finished)
    assert time.process_time() - started < 1
    assert {item.desc for item in answer.objects} <= {"a"}


def test_of_a_long_malformed_answer_what_is_not_repaired_is_counted():
    answer = parse_answer("[" + OBJECT * 10_000, finished=True)
    assert answer.status == "repaired" and 50 < len(answer.objects) < 10_000
    assert answer.rejected == {"malformed": 1}
