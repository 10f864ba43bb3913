"""slurm/container.sh where it does not need a container: on the host, refused, or told to stop early.

What it does inside a real image on a real cluster stands in tests/cluster/test_container.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = str(REPO / "slurm" / "container.sh")


def enter(*command: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run container.sh with `env` besides PATH; `path` is searched first."""
    search = f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"
    return subprocess.run([SCRIPT, *command], env={"PATH": search, **env}, text=True, capture_output=True)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with an `apptainer` that answers `buildcfg` from a file and prints how it was called."""
    (tmp_path / "buildcfg").touch()
    program = tmp_path / "apptainer"
    program.write_text(
        f"""#!/bin/bash
        [ "$1" != buildcfg ] || {{ [ -z "${{STOP:-}}" ] || kill -s "$STOP" "$SCRIPT_PID"; exec cat {tmp_path}/buildcfg; }}
        echo "$@"
        """
    )
    program.chmod(0o755)
    (tmp_path / "image.sif").touch()
    return tmp_path


@pytest.mark.parametrize("code", [0, 3, 75])
def test_without_an_image_the_command_runs_on_the_host(code: int) -> None:
    assert enter("bash", "-c", f"exit {code}").returncode == code


def test_the_checkout_comes_first_on_the_python_path() -> None:
    told = enter("bash", "-c", "echo $PYTHONPATH", BBU_HOME="/some/checkout", PYTHONPATH="/other")
    assert told.stdout == "/some/checkout:/other\n"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"BBU_IMAGE": "/no/such.sif"}, "no image at BBU_IMAGE=/no/such.sif"),
        ({"BBU_IMAGE": SCRIPT}, "apptainer is not on PATH"),
        ({"BBU_HOME": "/a,b"}, "comma or colon"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(env: dict[str, str], reason: str) -> None:
    done = enter("true", **env)
    assert done.returncode == 127
    assert reason in done.stderr and done.stderr.count("\n") == 1


def test_a_command_is_required() -> None:
    assert "no command given" in enter().stderr


def test_a_wrong_shield_is_refused(stub: Path) -> None:
    done = enter("true", path=stub, BBU_IMAGE=str(stub / "image.sif"), BBU_SHIELD="yes")
    assert (done.returncode, done.stderr) == (127, "container.sh: BBU_SHIELD=yes; it is auto, on or off\n")


def setuid_install(stub: Path, configuration: str) -> None:
    (stub / "apptainer.d" / "bin").mkdir(parents=True)
    starter = stub / "apptainer.d" / "bin" / "starter-suid"
    starter.touch()
    starter.chmod(0o4755)
    (stub / "apptainer.d").rename(stub / "libexec")
    os.makedirs(stub / "lib")
    (stub / "libexec").rename(stub / "lib" / "apptainer")
    (stub / "apptainer.conf").write_text(configuration)
    facts = f"APPTAINER_SUID_INSTALL=1\nLIBEXECDIR={stub}/lib\nAPPTAINER_CONF_FILE={stub}/apptainer.conf\n"
    (stub / "buildcfg").write_text(facts)


def test_an_apptainer_that_mounts_through_the_kernel_gets_the_image_itself(stub: Path) -> None:
    setuid_install(stub, "allow setuid = yes\n")
    image = str(stub / "image.sif")
    told = enter("python", "-V", path=stub, BBU_IMAGE=image, BBU_HOME="/home/x", BBU_NV="1", BBU_BINDS="/data,/b:/c")
    words = told.stdout.split()
    assert words[-3:] == [image, "python", "-V"]
    assert "--nv" in words and "/home/x" in words and "/data,/b:/c" in words and "--cleanenv" not in words


def test_a_setuid_install_whose_administrator_forbids_kernel_mounts_needs_the_shield(stub: Path) -> None:
    setuid_install(stub, "allow setuid-mount squashfs = no\n")
    done = enter("true", path=stub, BBU_IMAGE=str(stub / "image.sif"))
    assert done.returncode == 127  # the shield went to look for a squashfs in our empty file
    assert "holds no squashfs" in done.stderr or "squashfuse_ll" in done.stderr


@pytest.mark.parametrize("signal", ["USR1", "USR2", "TERM"])
def test_a_stop_before_the_command_began_asks_to_be_run_again(stub: Path, signal: str) -> None:
    setuid_install(stub, "")
    line = f'SCRIPT_PID=$$ STOP={signal} exec {SCRIPT} touch {stub}/began'
    env = {"PATH": f"{stub}:/usr/bin:/bin", "BBU_IMAGE": str(stub / "image.sif")}
    done = subprocess.run(["bash", "-c", line], env=env, text=True, capture_output=True)
    assert done.returncode == 75, done.stderr
    assert f"{signal} came before" in done.stderr and done.stdout == ""
