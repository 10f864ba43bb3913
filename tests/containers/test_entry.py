"""slurm/container.sh where it does not need a container: on the host, refused, or told to stop early.

What it does inside a real image on a real cluster stands in tests/cluster/test_container.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = str(REPO / "slurm" / "container.sh")


def enter(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run container.sh with `env`, by default with a plain PATH alone."""
    full = {"PATH": "/usr/bin:/bin"} | (env or {})
    return subprocess.run([SCRIPT, *command], env=full, text=True, capture_output=True)


def with_stub(stub: Path, **env: str) -> dict[str, str]:
    return {"PATH": f"{stub}:/usr/bin:/bin", "BBU_IMAGE": str(stub / "image.sif"), **env}


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with an `apptainer` that answers `buildcfg` from a file and prints how it was called."""
    (tmp_path / "buildcfg").touch()
    program = tmp_path / "apptainer"
    program.write_text(
        f"""#!/bin/bash
        [ "$1" = buildcfg ] || exec echo "$@"
        [ -z "${{STOP:-}}" ] || kill -s "$STOP" "$SCRIPT_PID"
        cat {tmp_path}/buildcfg
        """
    )
    program.chmod(0o755)
    (tmp_path / "image.sif").touch()
    return tmp_path


@pytest.mark.parametrize("code", [0, 3, 75])
def test_without_an_image_the_command_runs_on_the_host(code: int) -> None:
    assert enter("bash", "-c", f"exit {code}").returncode == code


def test_the_checkout_comes_first_on_the_python_path() -> None:
    told = enter("bash", "-c", "echo $PYTHONPATH", env={"BBU_HOME": "/some/checkout", "PYTHONPATH": "/other"})
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
    done = enter("true", env=env)
    assert done.returncode == 127
    assert reason in done.stderr and done.stderr.count("\n") == 1


def test_a_command_is_required() -> None:
    assert "no command given" in enter().stderr


def test_a_wrong_shield_is_refused(stub: Path) -> None:
    done = enter("true", env=with_stub(stub, BBU_SHIELD="yes"))
    assert (done.returncode, done.stderr) == (127, "container.sh: BBU_SHIELD=yes; it is auto, on or off\n")


def setuid_install(stub: Path, configuration: str) -> None:
    starter = stub / "lib" / "apptainer" / "bin" / "starter-suid"
    starter.parent.mkdir(parents=True)
    starter.touch()
    starter.chmod(0o4755)
    (stub / "apptainer.conf").write_text(configuration)
    facts = f"APPTAINER_SUID_INSTALL=1\nLIBEXECDIR={stub}/lib\nAPPTAINER_CONF_FILE={stub}/apptainer.conf\n"
    (stub / "buildcfg").write_text(facts)


def test_an_apptainer_that_mounts_through_the_kernel_gets_the_image_itself(stub: Path) -> None:
    setuid_install(stub, "allow setuid = yes\n")
    settings = {"BBU_HOME": "/home/x", "BBU_NV": "1", "BBU_BINDS": "/data,/b:/c"}
    words = enter("python", "-V", env=with_stub(stub, **settings)).stdout.split()
    assert words[-3:] == [str(stub / "image.sif"), "python", "-V"]
    assert "--nv" in words and "/home/x" in words and "/data,/b:/c" in words and "--cleanenv" not in words


def test_a_setuid_install_whose_administrator_forbids_kernel_mounts_needs_the_shield(stub: Path) -> None:
    setuid_install(stub, "allow setuid-mount squashfs = no\n")
    done = enter("true", env=with_stub(stub))
    assert done.returncode == 127  # the shield went to look for a squashfs in our empty file
    assert "holds no squashfs" in done.stderr or "squashfuse_ll" in done.stderr


@pytest.mark.parametrize("signal", ["USR1", "USR2", "TERM"])
def test_a_stop_before_the_command_began_asks_to_be_run_again(stub: Path, signal: str) -> None:
    setuid_install(stub, "")
    line = f"SCRIPT_PID=$$ STOP={signal} exec {SCRIPT} touch {stub}/began"
    done = subprocess.run(["bash", "-c", line], env=with_stub(stub), text=True, capture_output=True)
    assert done.returncode == 75, done.stderr
    assert f"{signal} came before" in done.stderr and done.stdout == ""
