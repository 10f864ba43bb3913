"""Arguments that several entries share, and the config that they name."""

from __future__ import annotations

import argparse

import pytest

from bbu.config.arguments import add_config_arguments, add_log_arguments, config_from_arguments, positive_int
from bbu.config.flat import DirectConfig
from bbu.errors import ConfigError


def config_of(*arguments: str, **environ: str) -> DirectConfig:
    """Load the config that a command line and the environment name."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    add_log_arguments(parser)
    return config_from_arguments(parser.parse_args(["--config", "smoke", *arguments]), environ)


def test_overrides_and_log_arguments_replace_values():
    config = config_of("--set", "seed=7", "--set", "llm_lr=1e-6", "--log_level", "DEBUG", "--log_verbose", "true")
    assert (config.seed, config.llm_lr, config.log_level, config.log_verbose) == (7, 1e-6, "DEBUG", True)
    assert config.overrides == ("seed=7", "llm_lr=1e-6", "log_level=DEBUG", "log_verbose=true")


def test_the_command_line_wins_over_the_environment():
    environ = {"BBU_DEEPSPEED_ENABLED": "true", "BBU_DEEPSPEED_CONFIG": "other.json"}
    config = config_of("--set", "deepspeed_enabled=false", **environ)
    assert (config.deepspeed_enabled, config.deepspeed_config) == (False, "other.json")


def test_the_config_is_required_where_no_other_serves():
    with pytest.raises(SystemExit):
        config_of("--config")
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, required=False, description="the checkpoint's")
    assert parser.parse_args([]).config is None


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_only_whole_numbers_above_0_are_counts(text: str):
    assert positive_int("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="whole number above 0"):
        positive_int(text)


@pytest.mark.parametrize(("word", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False)])
def test_a_switch_of_the_environment_takes_the_words_of_a_shell(word: str, value: bool):
    assert config_of(BBU_DEEPSPEED_ENABLED=word).deepspeed_enabled is value


def test_a_wrong_switch_names_its_variable():
    with pytest.raises(ConfigError, match="the variable BBU_DEEPSPEED_ENABLED is 'maybe'; set it to true or false"):
        config_of(BBU_DEEPSPEED_ENABLED="maybe")


def test_a_refused_override_names_its_argument_and_not_the_file():
    with pytest.raises(ConfigError) as caught:
        config_of("--set", "training.seed=1", "--set", "seed", "--set", "LLM-LR=1", "--set", "seed=a")
    assert caught.value.findings == (
        "--set: unknown key 'training.seed'; did you mean 'seed'?",
        "--set 'seed': write key=value",
        "--set: unknown key 'LLM-LR'; did you mean 'llm_lr'?",
        "--set seed=a: key 'seed' must be a whole number, not 'a'",
    )
