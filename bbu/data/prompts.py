"""Prompts in Chinese and English, each in a detailed and a concise style.

The system prompt describes the answer once. The instruction follows the images of every turn, so it is short.
"""

from __future__ import annotations

from dataclasses import dataclass

from bbu.config.domains import Language, PromptStyle
from bbu.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """The fixed texts of a conversation."""

    system: str
    """Opens the conversation."""
    instruction: str
    """Follows the images of every turn."""


_PROMPTS = {
    ("zh", "detailed"): Prompt(
        system=(
            "你是通信机房的设备质检员，负责检查BBU机柜的照片。\n"
            "请找出照片中每一个需要检查的部件：螺丝连接点、bbu基带处理单元、挡风板、机柜空间、标签贴纸和线缆。\n"
            "回答是一个JSON列表，每个部件一项，先上后下、先左后右：\n"
            '[{"bbox_2d": [x1, y1, x2, y2], "desc": "类型/属性/补充说明"}]\n'
            "bbox_2d是部件外框左上角和右下角的绝对像素坐标，用整数；"
            "desc用斜杠连接部件的类型、属性和看得出的状态，没有的层级省略。\n"
            "同类部件逐个列出，不要合并；看不清的不要猜。照片中没有部件时回答[]。只输出JSON，不加任何解释。"
        ),
        instruction="请检测照片中的所有部件，按要求的JSON格式给出位置和描述。",
    ),
    ("zh", "concise"): Prompt(
        system="你是BBU机柜质检员。回答只用JSON列表，坐标是绝对像素，没有部件时回答[]。",
        instruction='检测所有部件：[{"bbox_2d": [x1, y1, x2, y2], "desc": "类型/属性/补充说明"}]',
    ),
    ("en", "detailed"): Prompt(
        system=(
            "You inspect photos of BBU cabinets in telecom equipment rooms.\n"
            "Find every part that has to be checked: screw connection points, BBU units, wind baffles, cabinet "
            "space, label stickers and cables.\n"
            "Answer with one JSON list, one item per part, from top to bottom and left to right:\n"
            '[{"bbox_2d": [x1, y1, x2, y2], "desc": "type/property/extra"}]\n'
            "bbox_2d holds the top-left and bottom-right corner of the part in absolute integer pixels; desc "
            "joins the part's type, property and visible state with slashes and leaves out what is absent.\n"
            "List parts of the same kind one by one and do not guess what cannot be seen. If the photo shows no "
            "part, answer []. Output JSON only, without any explanation."
        ),
        instruction="Detect all parts in the photo; give position and description in the required JSON form.",
    ),
    ("en", "concise"): Prompt(
        system="You inspect BBU cabinets. Answer with a JSON list only, in absolute pixels; [] if there is no part.",
        instruction='Detect all parts: [{"bbox_2d": [x1, y1, x2, y2], "desc": "type/property/extra"}]',
    ),
}


def get_prompt(language: Language, style: PromptStyle) -> Prompt:
    """Return the prompt of a language and a style; raises ConfigError, which lists the valid pairs."""
    if (language, style) not in _PROMPTS:
        valid = ", ".join("/".join(key) for key in _PROMPTS)
        raise ConfigError(f"no prompt {language}/{style}; set language and the prompt to one of: {valid}")
    return _PROMPTS[language, style]
