"""slurm/container.sh under real Slurm, in the real image: codes, environment, what is run, and the stop signals.

What it refuses and how it counts stands in tests/containers/test_entry.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster
from tests.cluster.user import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def checkout(cluster: Cluster) -> Path:
    return cluster.checkout()


@pytest.fixture
def env(cluster: Cluster, checkout: Path) -> dict[str, str]:
    return {"BBU_IMAGE": str(cluster.image), "BBU_HOME": str(checkout)}


@pytest.fixture
def folder(cluster: Cluster) -> Path:
    """An empty folder of the user's, seen by all nodes."""
    return Path(cluster.run(["mktemp", "-d", "-p", cluster.shared]).stdout.strip())


@pytest.fixture(scope="module")
def pin(cluster: Cluster) -> str:
    return Path(f"{cluster.image}.sha256").read_text().split()[0]


def enter(checkout: Path, command: str) -> str:
    return f"srun -N2 --ntasks-per-node=1 {checkout}/slurm/container.sh {command}"


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_commands_exit_code_comes_back_through_srun(cluster: Cluster, checkout: Path, env: dict, code: int) -> None:
    done = cluster.run(enter(checkout, f"python {checkout}/tests/jobs/programs/leave.py {code}"), env=env, check=False)
    assert done.returncode == code, done.stderr


def test_a_killed_command_gives_128_and_its_signal(cluster: Cluster, checkout: Path, env: dict) -> None:
    line = f"{checkout}/slurm/container.sh python {checkout}/tests/jobs/programs/die.py"
    assert cluster.run(line, env=env, check=False).returncode == 128 + 9


def test_the_inside_sees_slurm_the_folder_and_the_checkout(cluster: Cluster, checkout: Path, env: dict) -> None:
    line = "bash -c 'echo $SLURM_PROCID $PWD $PYTHONPATH $HF_HUB_OFFLINE'"
    lines = cluster.run(enter(checkout, line), env=env, cwd=checkout).stdout.splitlines()
    assert sorted(lines) == [f"{rank} {checkout} {checkout} 1" for rank in (0, 1)]


def test_standard_input_reaches_the_command(cluster: Cluster, checkout: Path, env: dict) -> None:
    assert cluster.run(f"echo hello | {checkout}/slurm/container.sh cat", env=env).stdout == "hello\n"


def test_extra_folders_are_bound(cluster: Cluster, checkout: Path, env: dict) -> None:
    cluster.run(f"mkdir -p {checkout}/extra && touch {checkout}/extra/file")
    done = cluster.run(f"{checkout}/slurm/container.sh ls /data", env=env | {"BBU_BINDS": f"{checkout}/extra:/data"})
    assert done.stdout == "file\n"


def test_the_pinned_image_is_hashed_once_for_all_ranks_and_starts(
    cluster: Cluster, checkout: Path, env: dict, folder: Path, pin: str
) -> None:
    env = env | {"BBU_IMAGE_SHA256": pin, "TMPDIR": str(folder)}
    seen = set()
    for _ in range(2):
        done = cluster.run(enter(checkout, "bash -c 'echo $BBU_IMAGE_DIGEST'"), env=env)
        assert done.stdout.split() == [pin, pin]
        seen |= {(note.name, note.stat().st_mtime_ns) for note in folder.glob("bbu-verified.*/*-*")}
    assert len(seen) == 1


def test_another_image_than_the_pinned_one_runs_nothing(
    cluster: Cluster, checkout: Path, env: dict, folder: Path, pin: str
) -> None:
    env = env | {"BBU_IMAGE_SHA256": pin[::-1], "TMPDIR": str(folder)}
    done = cluster.run(enter(checkout, f"touch {folder}/ran"), env=env, check=False)
    assert done.returncode == 127 and pin in done.stderr and pin[::-1] in done.stderr
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("signal", ["USR2", "TERM"])
def test_a_stop_while_the_image_is_hashed_asks_to_be_run_again(
    cluster: Cluster, checkout: Path, env: dict, folder: Path, pin: str, signal: str
) -> None:
    slow = f"cat >{folder}/sha256sum && chmod +x {folder}/sha256sum <<<'' && touch {folder}/file"
    cluster.run(f"printf '#!/bin/sh\nexec sleep 60\n' | ({slow})")
    line = f"PATH={folder}:$PATH {enter(checkout, 'true')}; echo code $?"
    env = env | {"BBU_IMAGE_SHA256": pin, "TMPDIR": str(folder)}
    job = cluster.sbatch("-N2", "--wrap", line, cwd=folder, env=env)
    wait_for_job(lambda: list(folder.glob("bbu-verified.*/*.new")), cluster, job)
    cluster.run(["scancel", f"--signal={signal}", f"{job}.0"])
    cluster.wait(job)
    output = cluster.job_output(job)
    assert output.count(f"{signal} came before the command began") == 2 and "code 75" in output, output


def test_the_checkouts_code_runs_or_the_images(cluster: Cluster, checkout: Path, env: dict, folder: Path) -> None:
    cluster.run(f"cp -r {checkout}/bbu {checkout}/configs {folder} && echo 0123abc >{folder}/REVISION")
    line = f"{checkout}/slurm/container.sh python {checkout}/tests/cluster/programs/print_code.py"
    carried = {"BBU_BINDS": f"{folder}:/opt/bbu/src"}
    assert cluster.run(line, cwd=checkout, env=env | carried).stdout == f"{checkout}/bbu/__init__.py \n"
    built_in = cluster.run(line, cwd=checkout, env=env | {"BBU_CODE": "image"})
    assert built_in.stdout.startswith("/opt/bbu/src/bbu/__init__.py ")
    image = cluster.run(line, cwd=checkout, env=env | carried | {"BBU_CODE": "image"})
    assert image.stdout == "/opt/bbu/src/bbu/__init__.py 0123abc\n"
    module = f"{checkout}/slurm/container.sh python -m bbu.train --config smoke --validate-only"
    assert "/opt/bbu/src/" in cluster.run(module, cwd=checkout, env=env | carried | {"BBU_CODE": "image"}).stdout


def test_an_image_without_code_cannot_run_its_own(cluster: Cluster, checkout: Path, env: dict, folder: Path) -> None:
    env = env | {"BBU_CODE": "image", "BBU_BINDS": f"{folder}:/opt/bbu/src"}
    done = cluster.run(f"{checkout}/slurm/container.sh true", cwd=checkout, env=env, check=False)
    assert done.returncode == 127 and "the image holds no code" in done.stderr


def test_scratch_is_the_inner_tmpdir_and_goes_with_the_task(
    cluster: Cluster, checkout: Path, env: dict, folder: Path
) -> None:
    line = f"python {checkout}/tests/cluster/programs/make_temporary.py"
    done = cluster.run(enter(checkout, line), env=env | {"BBU_SCRATCH": str(folder)}, check=False)
    assert done.returncode == 3
    assert len({Path(path).parent for path in done.stdout.split()}) == 2
    assert all(path.startswith(f"{folder}/bbu-scratch.") for path in done.stdout.split())
    assert list(folder.iterdir()) == []


def mounted() -> set[str]:
    """Our own mounts of images; a job that another test had killed may have left one."""
    lines = Path("/proc/mounts").read_text().splitlines()
    return {line.split()[1] for line in lines if "bbu-image" in line}


def test_nothing_stays_mounted(cluster: Cluster, checkout: Path, env: dict) -> None:
    before = mounted()
    cluster.run(f"{checkout}/slurm/container.sh false", env=env, check=False)
    assert mounted() <= before


def test_a_dead_mount_of_a_killed_job_is_swept_up_by_the_next(cluster: Cluster, checkout: Path, env: dict) -> None:
    before = mounted()
    killed = f"setsid {checkout}/slurm/container.sh python {checkout}/tests/cluster/programs/kill_group.py"
    cluster.run(killed, env=env, check=False)
    assert mounted() > before
    cluster.run(f"{checkout}/slurm/container.sh true", env=env)
    assert mounted() <= before


LEFT_BEHIND = """
{enter} python {program} {folder}/go >{folder}/out & owner=$!
until grep -q up {folder}/out; do sleep 0.05; done
{enter} true; grep -c {folder}/bbu-image /proc/mounts
kill -KILL $owner
{enter} true; grep -c {folder}/bbu-image /proc/mounts
pgrep -ax squashfuse_ll | grep -c {folder}
touch {folder}/go; until grep -q read {folder}/out; do sleep 0.05; done
timeout 20 bash -c 'while pgrep -ax squashfuse_ll | grep -q {folder}; do sleep 0.1; done'
pgrep -ax squashfuse_ll | grep -c {folder}
ls -d {folder}/bbu-image* 2>/dev/null
true"""


def test_a_killed_ones_mount_is_swept_up_by_the_next_but_a_living_ones_is_not(
    cluster: Cluster, checkout: Path, env: dict, folder: Path
) -> None:
    program = checkout / "tests/cluster/programs/read_image_late.py"
    script = LEFT_BEHIND.format(enter=f"{checkout}/slurm/container.sh", program=program, folder=folder)
    counts = cluster.run(script, env=env | {"TMPDIR": str(folder)}).stdout.split()
    # mounted while it lives; unmounted once its owner is killed; served while the program still reads; ended
    assert counts == ["1", "0", "1", "0"]
    assert "read 3.0" in (folder / "out").read_text()


def test_the_help_of_the_image_can_be_followed(cluster: Cluster, checkout: Path) -> None:
    text = cluster.run(["apptainer", "run-help", cluster.image]).stdout
    command = re.search(r"^ +(apptainer exec (?:.*\\\n)*.*)", text, flags=re.MULTILINE)
    assert command and "python -m bbu.train --config smoke" in command[1]
    cluster.run(["ln", "-s", cluster.image, checkout / "containers" / "bbu-cpu.sif"])
    for line in (command[1], command[1].replace("exec", "exec --nv")):
        assert "smoke.yaml: valid" in cluster.run(f"{line} --validate-only", cwd=checkout).stdout


def test_a_signed_copy_can_be_verified(cluster: Cluster, checkout: Path, folder: Path) -> None:
    user = {"HOME": str(folder)}
    key = "--name Test --email test@example.org --comment none --password '' --push=false --bit-length 2048"
    cluster.run(f"apptainer key newpair {key}", env=user)
    cluster.run([checkout / "containers" / "build.sh", "cpu", "--out", "signed.sif", "--sign"], cwd=folder, env=user)
    cluster.run("apptainer verify --local signed.sif && sha256sum --check signed.sif.sha256", cwd=folder, env=user)
    (folder / "signed.sif").unlink()


@pytest.mark.parametrize(
    ("definition", "names"), [("base-cuda.def", ["KEY", "JOBS"]), ("bbu.def", ["KIND", "FILE", "KEY", "REVISION"])]
)
def test_apptainer_can_read_the_definitions_of_the_gpu_image(
    cluster: Cluster, checkout: Path, folder: Path, definition: str, names: list[str]
) -> None:
    """As far as what it starts from, which is made to fail: stages, sections and arguments are in order."""
    text = (checkout / "containers" / definition).read_text()
    local = "Bootstrap: localimage\nFrom: /no/base"
    text = re.sub(r"^Bootstrap: (docker|localimage)\nFrom: .*", local, text, flags=re.MULTILINE)
    (checkout / "containers" / "local.def").write_text(text)
    arguments = [f"--build-arg={name}=x" for name in names]
    command = ["apptainer", "build", "--fakeroot", *arguments, folder / "image.sif", "local.def"]
    done = cluster.run(command, cwd=checkout / "containers", check=False)
    assert "failed to retrieve path for /no/base" in done.stderr, done.stderr


def survivors(cluster: Cluster, checkout: Path, env: dict, signal: str) -> str:
    """Start a program on both nodes that catches stop signals, send one to the step; the job's output."""
    line = enter(checkout, f"python {checkout}/tests/cluster/programs/survivor.py")
    job = cluster.sbatch("-N2", "--wrap", f"{line}; echo code $?", cwd=checkout, env=env)
    wait_for_output(cluster, job, "ready", times=2)
    cluster.run(["scancel", f"--signal={signal}", f"{job}.0"])
    cluster.wait(job)
    return cluster.job_output(job)


def wait_for_output(cluster: Cluster, job: str, text: str, times: int) -> None:
    wait_for_job(lambda: cluster.job_output(job).count(text) >= times, cluster, job)


def wait_for_job(condition: Callable[[], object], cluster: Cluster, job: str) -> None:
    wait_until(condition, 60, lambda: cluster.describe(job))


@pytest.mark.parametrize("signal", ["USR1", "USR2", "TERM"])
def test_a_signalled_program_can_save_and_hand_back_its_code(
    cluster: Cluster, checkout: Path, env: dict, signal: str
) -> None:
    output = survivors(cluster, checkout, env, signal)
    assert output.count(f"saved after SIG{signal}") == 2, output
    assert "code 75" in output, output


def test_without_the_shield_the_image_vanishes_under_the_program(cluster: Cluster, checkout: Path, env: dict) -> None:
    output = survivors(cluster, checkout, env | {"BBU_SHIELD": "off"}, "USR2")
    assert "saved" not in output, output
    assert "code 135" in output, output  # 128 + SIGBUS
