"""Cluster profiles: the facts of a site (partitions, image, binds), apart from what a run is.

A profile is `configs/clusters/NAME.yaml`. It states every field; there are no defaults, so that a profile
read next year means what it means today. `${NAME}` in a text stands for an environment variable of the caller.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from bbu.config.file_kinds import file_kind
from bbu.config.kinds import CrossRule, ProfileText, pattern_rule, range_rule
from bbu.config.read import CONFIG_DIR, expand_variables, read_dataclass, resolve_config_path
from bbu.config.yaml_files import read_yaml
from bbu.errors import ConfigError
from bbu.jobs.spec import Resources

PROFILES = CONFIG_DIR / "clusters"
GpuRequest = Literal["gpus-per-node", "gres"]
_KINDS = ("train", "convert", "eval")
_Digest = Annotated[ProfileText, pattern_rule(r"[0-9a-f]{64}", "be a SHA-256 in hex, as containers/build.sh prints it")]


@dataclass(frozen=True)
class ClusterProfile:
    """One site."""

    executor: Literal["slurm", "local"]
    """Who runs jobs: Slurm, or this machine."""
    work_folder: ProfileText
    """Folder of job scripts and logs, on a filesystem that all nodes see."""
    image: ProfileText | None
    """Container image; null runs on the host."""
    image_sha256: _Digest | None
    """SHA-256 that the image must have, checked on each node before a job enters it; null accepts any image."""
    code: Literal["checkout", "image"]
    """Which code runs: the checkout, or the copy inside the image."""
    binds: list[ProfileText]
    """Folders bound into the image, beside the checkout and the current folder."""
    scratch: ProfileText | None
    """Folder for temporary files on each node's own disk; null for /tmp."""
    shield: Literal["auto", "on", "off"]
    """Keep the image of an unprivileged Apptainer mounted when Slurm signals the job; see slurm/container.sh."""
    modules: list[ProfileText]
    """Environment modules that a job loads before its tasks start."""
    gpu_request: GpuRequest
    """The option of sbatch that requests GPUs."""
    signal_seconds: Annotated[int, range_rule(1, 65_535)]  # Slurm keeps it in 16 bits
    """How long before its time limit a job gets USR2, in seconds."""
    network_interface: ProfileText | None
    """Network interface of NCCL and gloo; null lets them choose."""
    master_suffix: ProfileText
    """Appended to the first node's name to get an address that all nodes resolve."""
    convert_tasks: Annotated[int, range_rule(1, 1_000_000)]
    """Elements of the conversion's job array."""
    array_parallelism: Annotated[int, range_rule(1, 1_000_000)]
    """Elements of a job array that may run at the same time."""
    eval_schedule: Literal["auto", "scrontab", "resubmit", "dependency"]
    """How `submit eval --every` repeats: by scrontab, by a job that submits itself again, or once by dependency on
    the training jobs; auto takes the first of these that the site allows."""
    environment: dict[ProfileText, ProfileText]
    """More environment variables of the tasks."""
    train: Resources
    """Resources of a training job."""
    convert: Resources
    """Resources of an element of the conversion."""
    eval: Resources
    """Resources of an eval job."""


_CROSS_RULES = (
    CrossRule(
        ("executor", "modules"),
        lambda executor, modules: executor == "local" and modules,
        "modules: the local executor loads none; load them yourself and state []",
    ),
    CrossRule(
        ("code", "image"),
        lambda code, image: code == "image" and not image,
        "code: is image, but image is null; name one, or state checkout",
    ),
    CrossRule(
        ("image_sha256", "image"),
        lambda digest, image: digest and not image,
        "image_sha256: is set, but image is null; name one, or state null",
    ),
    *(
        CrossRule(
            (f"{kind}.memory", f"{kind}.gpus_per_node"),
            lambda memory, gpus: "per gpu" in (memory or "") and not gpus,
            f"{kind}.memory: is {{0}}, but gpus_per_node is 0; request memory per cpu or per node",
        )
        for kind in _KINDS
    ),
    *(
        CrossRule(
            (f"{kind}.gpu_type", f"{kind}.gpus_per_node"),
            lambda gpu_type, gpus: gpu_type and not gpus,
            f"{kind}.gpu_type: is {{0}}, but gpus_per_node is 0; state null",
        )
        for kind in _KINDS
    ),
    *(
        CrossRule(
            ("signal_seconds", f"{kind}.time_minutes"),
            lambda seconds, minutes: seconds >= 60 * minutes,
            f"{kind}.time_minutes: is {{1}}, so that each start gets the signal to save at once; state more minutes, "
            "or fewer than {0} as signal_seconds",
        )
        for kind in _KINDS
    ),
)


def load_profile(name: str, environ: Mapping[str, str] = os.environ) -> ClusterProfile:
    """Read and check a cluster profile.

    Args:
        name: a name under configs/clusters, or a path.
        environ: what `${NAME}` in a text is replaced from.

    Raises:
        ConfigError: carries all findings.
    """
    path = resolve_config_path(name, PROFILES, "cluster profile")
    values = read_yaml(path)
    if file_kind(values):
        raise ConfigError(f"{path}: is no cluster profile but a run config; name it with --config")
    return read_dataclass(ClusterProfile, expand_variables(values, environ), path, _CROSS_RULES)
