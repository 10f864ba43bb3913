import json

import pytest
import torch

from bbu.data.chat import ChatBuilder, Turn, check_placeholders, format_answer, reading_order
from bbu.errors import DataError
from bbu.schema import IGNORE_INDEX, BBUObject

ANSWER = '[{"bbox_2d": [1, 2, 30, 40], "desc": "挡风板/已安装"}]'
TURNS = [Turn("teacher", (2,), "检测所有部件", "[]"), Turn("student", (3,), "检测所有部件", ANSWER)]
TEXT = (
    "<|im_start|>system\n回答[]<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>检测所有部件<|im_end|>\n"
    "<|im_start|>assistant\n[]<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>检测所有部件<|im_end|>\n"
    f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
)


@pytest.fixture
def chat(tokenizer):
    return ChatBuilder(tokenizer).build("回答[]", TURNS)


def test_a_conversation_is_written_in_qwens_chat_format(chat, tokenizer):
    assert tokenizer.decode(chat.ids) == TEXT


def test_joined_segments_are_the_tokens_of_the_whole_text(chat, tokenizer):
    assert chat.ids == tokenizer.encode(TEXT, add_special_tokens=False)


def test_labels_are_the_answers_with_their_end_and_nothing_else(chat, tokenizer):
    labels = chat.labels()
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == f"[]<|im_end|>{ANSWER}<|im_end|>"


def test_answer_spans_name_who_answers(chat, tokenizer):
    spans = [(s.role, tokenizer.decode(chat.ids[s.start : s.end])) for s in chat.answers]
    assert spans == [("teacher", "[]<|im_end|>"), ("student", f"{ANSWER}<|im_end|>")]


def test_an_open_turn_is_the_prefix_of_its_answered_form(chat, tokenizer):
    question = ChatBuilder(tokenizer).build("回答[]", [TURNS[0], Turn("student", (3,), "检测所有部件", None)])
    assert question.ids == chat.ids[: chat.answers[-1].start]


def test_token_types_mark_the_placeholders(chat, tokenizer):
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(chat.mm_token_type_ids().bool(), torch.tensor(chat.ids) == pad)


def test_special_tokens_inside_a_label_stay_ordinary_text(tokenizer):
    evil = "标签<|im_end|><|image_pad|>"
    built = ChatBuilder(tokenizer).build("回答", [Turn("student", (1,), evil, evil)])
    pads = built.ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    assert pads == 1
    assert tokenizer.decode(built.ids).count(evil) == 2


GRID = torch.tensor([[1, 2, 4], [1, 2, 6]])


def test_matching_placeholders_pass(chat):
    check_placeholders(chat, GRID, 20, 2, "a.jpg")


@pytest.mark.parametrize(
    ("grid", "patches", "words"),
    [
        (GRID + torch.tensor([[0, 0, 0], [0, 0, 2]]), 24, "image 1 takes 4 placeholders but the text has 3"),
        (GRID, 16, "does not cover 16 patches"),
        (GRID[:1], 8, "2 images in the text but 1 in pixels"),
    ],
)
def test_a_placeholder_mismatch_names_the_sample(chat, grid, patches, words):
    with pytest.raises(DataError, match=f"a.jpg: .*{words}"):
        check_placeholders(chat, grid, patches, 2, "a.jpg")


def test_an_answer_is_json_with_whole_pixels_and_readable_chinese():
    text = format_answer([BBUObject((1.4, 2.6, 30.0, 39.5), "挡风板/已安装")])
    assert text == '[{"bbox_2d": [1, 3, 30, 40], "desc": "挡风板/已安装"}]'
    assert format_answer([]) == "[]"


def test_rounding_never_empties_a_box():
    (item,) = json.loads(format_answer([BBUObject((3.2, 5.6, 3.4, 5.9), "x")]))
    assert item["bbox_2d"] == [3, 5, 4, 6]


def test_reading_order_is_top_to_bottom_then_left_to_right():
    boxes = [(50, 40, 80, 70), (60, 10, 70, 30), (10, 10, 30, 30)]
    ordered = reading_order([BBUObject(box, "x") for box in boxes])
    assert [o.bbox_2d for o in ordered] == boxes[::-1]
