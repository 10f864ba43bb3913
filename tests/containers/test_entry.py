"""slurm/container.sh where it needs no container: on the host, refused, or stopped before the command.

tests/cluster/test_container.py tests it in a real image on a real cluster.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
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
    done = enter("bash", "-c", "echo $PYTHONPATH", env={"BBU_HOME": "/some/checkout", "PYTHONPATH": "/other"})
    assert done.stdout == "/some/checkout:/other\n"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"BBU_IMAGE": "/no/such.sif"}, "no image at BBU_IMAGE=/no/such.sif"),
        ({"BBU_IMAGE": SCRIPT}, "apptainer is not on PATH"),
        ({"BBU_IMAGE": SCRIPT, "BBU_HOME": "/a,b"}, "comma or colon"),
        ({"BBU_CODE": "picture"}, "BBU_CODE=picture; it is checkout or image"),
        ({"BBU_CODE": "image"}, "BBU_CODE=image, but there is no image"),
        ({"BBU_IMAGE_SHA256": "0" * 64}, "pins an image, but there is none"),
        ({"BBU_IMAGE": SCRIPT, "BBU_IMAGE_SHA256": "0" * 63}, "it is 64 hexadecimal digits"),
        ({"BBU_IMAGE": "/usr", "BBU_IMAGE_SHA256": "0" * 64}, "pins a file, but BBU_IMAGE=/usr is a folder"),
        ({"BBU_SCRATCH": "/no/such"}, "BBU_SCRATCH=/no/such is no folder you can write to"),
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


# The image that is pinned.


def pinned(stub: Path, **env: str) -> dict[str, str]:
    """An image of some bytes and its pin, entered through the kernel; notes and a counted sha256sum in `stub`."""
    setuid_install(stub, "")
    (stub / "image.sif").write_bytes(b"some bytes")
    program = stub / "sha256sum"
    program.write_text(
        f"#!/bin/bash\necho once >>{stub}/hashed\n[ ! -e {stub}/slow ] || exec sleep 30\nexec /usr/bin/sha256sum"
    )
    program.chmod(0o755)
    pin = hashlib.sha256(b"some bytes").hexdigest()
    return with_stub(stub, TMPDIR=str(stub), BBU_IMAGE_SHA256=pin, **env)


def hashed(stub: Path) -> int:
    return len((stub / "hashed").read_text().splitlines())


def test_an_image_that_is_the_pinned_one_is_entered_and_hashed_once(stub: Path) -> None:
    env = pinned(stub)
    for case in (env, env, env | {"BBU_IMAGE_SHA256": env["BBU_IMAGE_SHA256"].upper()}):
        done = enter("true", env=case)
        assert done.returncode == 0 and done.stdout.startswith("--silent exec"), done.stderr
    assert hashed(stub) == 1
    notes = next(stub.glob("bbu-verified.*"))
    assert notes.stat().st_mode & 0o777 == 0o700


def test_another_image_than_the_pinned_one_is_refused_with_both_hashes(stub: Path) -> None:
    env = pinned(stub) | {"BBU_IMAGE_SHA256": "0" * 64}
    for _ in range(2):
        done = enter("true", env=env)
        assert done.returncode == 127 and done.stderr.count("\n") == 1 and done.stdout == ""
        assert "0" * 64 in done.stderr and hashlib.sha256(b"some bytes").hexdigest() in done.stderr
    assert hashed(stub) == 1


def test_an_image_that_changed_is_hashed_again(stub: Path) -> None:
    env = pinned(stub)
    image = stub / "image.sif"
    before = image.stat()
    assert enter("true", env=env).returncode == 0
    image.write_bytes(b"SOME BYTES")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # the size is the same too
    assert enter("true", env=env).returncode == 127
    assert hashed(stub) == 2


def test_ranks_that_start_at_once_hash_once(stub: Path) -> None:
    env = pinned(stub)
    ranks = [subprocess.Popen([SCRIPT, "true"], env=env, stdout=subprocess.DEVNULL) for _ in range(8)]
    assert [rank.wait() for rank in ranks] == [0] * 8
    assert hashed(stub) == 1


def test_a_folder_of_notes_that_others_may_write_to_is_refused(stub: Path) -> None:
    env = pinned(stub)
    enter("true", env=env)
    next(stub.glob("bbu-verified.*")).chmod(0o777)
    done = enter("true", env=env)
    assert done.returncode == 127 and "mode 700" in done.stderr


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
@pytest.mark.parametrize("waits", [False, True], ids=["hashing", "waiting"])
def test_a_stop_signal_to_all_while_the_image_is_hashed_gives_75_at_once(stub: Path, name: str, waits: bool) -> None:
    env = pinned(stub)
    (stub / "slow").touch()
    first = subprocess.Popen([SCRIPT, "true"], env=env, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (stub / "hashed").exists())
    stopped = first
    if waits:
        stopped = subprocess.Popen([SCRIPT, "true"], env=env, start_new_session=True, stderr=subprocess.PIPE, text=True)
        time.sleep(0.3)
    begin = time.monotonic()
    os.killpg(stopped.pid, getattr(signal, f"SIG{name}"))
    error = stopped.communicate()[1]
    assert (stopped.returncode, error) == (75, f"container.sh: {name} came before the command began; not started\n")
    assert time.monotonic() - begin < 5
    if waits:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The scratch folder.


@pytest.mark.parametrize("code", [0, 3])
def test_the_command_has_a_scratch_folder_of_its_own_until_it_ends(tmp_path: Path, code: int) -> None:
    done = enter("bash", "-c", f'touch "$TMPDIR/file"; echo "$TMPDIR"; exit {code}', env={"BBU_SCRATCH": str(tmp_path)})
    assert done.returncode == code
    assert Path(done.stdout.strip()).parent == tmp_path and list(tmp_path.iterdir()) == []


def test_two_commands_do_not_share_their_scratch(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "BBU_SCRATCH": str(tmp_path)}
    command = [SCRIPT, "bash", "-c", 'echo "$TMPDIR"; sleep 0.3; ls "$TMPDIR/.."']
    both = [subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    assert len({process.communicate()[0].splitlines()[0] for process in both}) == 2


def test_the_scratch_is_bound_into_the_container(stub: Path) -> None:
    setuid_install(stub, "")
    words = enter("true", env=with_stub(stub, BBU_SCRATCH=str(stub))).stdout.split()
    assert [word for word in words if word.startswith(f"{stub}/bbu-scratch.")]


def test_the_scratch_of_a_killed_one_is_removed_by_the_next_but_not_under_a_living_program(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "BBU_SCRATCH": str(tmp_path)}
    command = [SCRIPT, "bash", "-c", "echo up; sleep 30"]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "up\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.kill()  # container.sh alone
    process.wait()
    enter("true", env=env)
    assert len(list(tmp_path.iterdir())) == 1
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    wait_until(lambda: not enter("true", env=env).returncode and not list(tmp_path.iterdir()))
