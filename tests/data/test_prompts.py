import pytest

from bbu.data.prompts import get_prompt
from bbu.errors import ConfigError


@pytest.mark.parametrize("language", ["zh", "en"])
def test_concise_is_shorter_and_both_state_the_answer_form(language):
    detailed, concise = get_prompt(language, "detailed"), get_prompt(language, "concise")
    assert len(concise.system) < len(detailed.system) / 2
    for prompt in (detailed, concise):
        assert '[{"bbox_2d": [x1, y1, x2, y2], "desc":' in prompt.system + prompt.instruction


def test_an_unknown_prompt_is_refused_with_the_valid_ones():
    with pytest.raises(ConfigError, match=r"fr/detailed.*zh/detailed, zh/concise, en/detailed, en/concise"):
        get_prompt("fr", "detailed")
