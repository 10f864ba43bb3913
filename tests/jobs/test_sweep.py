"""Sweeps: a grid over config keys, a run for each point."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbu.config.domains import OWNERS, keys_used_for
from bbu.errors import ConfigError
from bbu.jobs.clusters import load_profile
from bbu.jobs.plan import load_request_config, missing_inputs, plan_jobs
from bbu.jobs.request import Request, parse_request
from bbu.jobs.sweep import point_name, sweep_points
from bbu.submit import main

CONVERSION = Path(__file__).resolve().parents[2] / "bbu/conversion"
VALUES = st.lists(st.sampled_from(["1", "2e-5", "abc", "0.1", "true"]), min_size=1, max_size=4, unique=True)


@given(VALUES, VALUES)
def test_every_combination_is_there_once(first: list[str], second: list[str]):
    points = sweep_points([f"llm_lr={','.join(first)}", f"seed={','.join(second)}"])
    assert sorted(points) == sorted((f"llm_lr={a}", f"seed={b}") for a in first for b in second)


@pytest.mark.parametrize(
    ("axes", "finding"),
    [
        (["seed"], "write key=value,value"),
        (["seed=1,,2"], "write key=value,value"),
        (["seed=1,1"], "twice"),
        (["seed=1", "seed=2"], "given twice"),
        (["run_name=a,b"], "gets a name of its own"),
        ([f"seed={','.join(map(str, range(200)))}", f"llm_lr={','.join(map(str, range(200)))}"], "at most 10000"),
    ],
)
def test_what_is_no_axis_is_refused(axes: list[str], finding: str):
    with pytest.raises(ConfigError, match=finding):
        sweep_points(axes)


def test_a_run_is_named_by_its_point():
    assert point_name("base", ("llm_lr=1e-6", "seed=2")) == "base.llm_lr-1e-6.seed-2"
    assert point_name("base", ("model_path=a/b",)) == "base.model_path-a_b"


def request(*argv: str) -> Request:
    return parse_request([*argv, "--config", "smoke", "--cluster", "local"])


def test_each_point_trains_scores_and_is_compared():
    sweep = request("--sweep", "llm_lr=1e-6,5e-6", "--sweep", "seed=1,2")
    profile, config = load_profile("local"), load_request_config(sweep)
    train, evaluate, compare = plan_jobs(sweep, profile, config, missing_inputs(sweep, profile, config))
    names = [command[command.index("--set") + 5] for command in train.commands]
    assert names[0] == "run_name=smoke.llm_lr-1e-6.seed-1" and len(set(names)) == len(train.commands) == 4
    assert [command[-1].rpartition("/")[2] for command in evaluate.commands] == [
        name.replace("run_name=", "output-") for name in names
    ]
    assert (evaluate.after, evaluate.after_any, compare.after, compare.after_any) == (("train",), True, ("eval",), True)
    assert len(compare.commands) == 1 and compare.commands[0][-1].endswith("/sweep-smoke/table.md")


def test_the_command_that_resumes_a_point_trains_that_point_alone():
    sweep = request("--sweep", "seed=1,2", "--nodes", "2")
    command = sweep.at_point(("seed=2",), "smoke").resume_command()
    config = parse_request(command).load_config()
    assert (config.training.seed, config.infrastructure.run_name) == (2, "smoke.seed-2")
    assert command[:3] == ("train", "--nodes", "2") and "--sweep" not in command


def test_points_that_would_share_a_folder_are_refused():
    with pytest.raises(ConfigError, match="two runs would be called"):
        load_request_config(request("--sweep", "data_root=a/b,a_b"))


def test_a_pipeline_converts_once_so_what_the_conversion_reads_cannot_be_swept():
    with pytest.raises(ConfigError, match="a pipeline converts once"):
        load_request_config(request("pipeline", "--sweep", "max_pixels=28224,56448"))


def test_the_keys_that_the_conversion_reads_are_known():
    read = {key for key in OWNERS if any(f"config.{key}" in file.read_text() for file in CONVERSION.glob("*.py"))}
    assert read | set(keys_used_for("shard")) <= {*keys_used_for("conversion"), "convert_processes"}


def test_a_list_is_one_value():
    assert sweep_points(["response_types=[object_type],[object_type,property]"]) == [
        ("response_types=[object_type]",),
        ("response_types=[object_type,property]",),
    ]


def test_a_value_that_no_config_takes_is_refused_before_anything_is_submitted():
    with pytest.raises(ConfigError, match="llm_lr"):
        main(["--sweep", "llm_lr=1e-6,fast", "--config", "smoke", "--cluster", "local"])
