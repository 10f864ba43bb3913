"""The real clusters of the tests: two Slurm nodes and Apptainer on this machine, as an ordinary user."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FINAL_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
CACHES = (".", "__pycache__")
IMAGE_LIFETIME_S = 86_400
# What an image build needs of the caller's surroundings; everything else is kept out.
BUILD_ENVIRONMENT = ("PIP_", "SSL_CERT_", "REQUESTS_CA_", "http_proxy", "https_proxy", "no_proxy")


class ClusterUnavailable(Exception):
    """This machine cannot run the test cluster; the message names what is missing."""


@dataclass(frozen=True)
class Cluster:
    """A running test cluster.

    `shared` is this session's folder on the filesystem all nodes see, owned by `user`; `python` is the
    login node's interpreter, which has the torch-free dependencies only; `env_file` under `prefix` makes a
    login environment, and so decides which of the two clusters this is.
    """

    prefix: Path
    user: str
    shared: Path
    image: Path
    env_file: str = "env.sh"

    @property
    def python(self) -> Path:
        return self.prefix / "login" / "bin" / "python"

    def run(
        self,
        command: str | Sequence[str | Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell line or an argv as the ordinary user, in a fresh login environment plus `env`."""
        argv = ["bash", "-c", command] if isinstance(command, str) else [str(part) for part in command]
        login = self.prefix / self.env_file
        return run_as(self.prefix, self.user, argv, cwd or self.shared, env or {}, timeout, check, login)

    def checkout(self) -> Path:
        """A fresh copy of the working tree on the shared filesystem, owned by the user."""
        return copy_tree(self.shared, self.user)

    def sbatch(self, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Submit a batch job and return its id."""
        return self.run(["sbatch", "--parsable", *arguments], cwd=cwd, env=env).stdout.strip()

    def state(self, job_id: str) -> set[str]:
        """The states of a job, or of all tasks of an array; empty while Slurm does not know it yet.

        slurmctld forgets a job MinJobAge (600 s) after its end; after that, only accounting knows it.
        """
        fields = [word for word in self.show(job_id).split() if word.startswith("JobState=")]
        if fields:
            return {field.removeprefix("JobState=") for field in fields}
        recorded = self.run(["sacct", "-j", job_id, "-XnPo", "State"], check=False).stdout
        return {line.split()[0] for line in recorded.splitlines() if line.strip()}

    def wait(self, job_id: str, states: frozenset[str] = FINAL_STATES, timeout: float = 180) -> str:
        """Wait until the job (each task of an array) is in one of `states`; return it (joined by commas)."""
        deadline = time.monotonic() + timeout
        while True:
            current = self.state(job_id)
            if current and current <= states:
                return ",".join(sorted(current))
            overdue = time.monotonic() > deadline
            assert not overdue, f"job {job_id} is {current} after {timeout} s\n{self.describe(job_id)}"
            time.sleep(0.5)

    def starts_of_a_requeued_job(self, timeout: float) -> list[str]:
        """What each start of a job that requeues itself once says of its restarts."""
        script = """echo restarts ${SLURM_RESTART_COUNT:-0}
        [ "${SLURM_RESTART_COUNT:-0}" = 1 ] || { scontrol requeue $SLURM_JOB_ID; sleep 60; }"""
        job = self.sbatch("--requeue", "--open-mode=append", "--wrap", script)
        assert self.wait(job, timeout=timeout) == "COMPLETED", self.describe(job)
        return [line for line in self.job_output(job).splitlines() if line.startswith("restarts")]

    def show(self, job_id: str) -> str:
        """What Slurm knows of a job, or of all tasks of an array, one a line."""
        return self.run(["scontrol", "show", "job", "-o", job_id], check=False).stdout

    def describe(self, job_id: str) -> str:
        """What Slurm and the job's own output say about it, for a failure message."""
        return f"{self.show(job_id)}\n--- output ---\n{self.job_output(job_id)[-4000:]}"

    def job_output(self, job_id: str) -> str:
        """Everything the job has printed so far (all tasks of an array, in order)."""
        files = dict.fromkeys(word[7:] for word in self.show(job_id).split() if word.startswith(("StdOut=", "StdErr=")))
        return "".join(Path(file).read_text(errors="replace") for file in files if Path(file).is_file())


def run_as(
    prefix: Path,
    user: str,
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    timeout: float,
    check: bool,
    env_file: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    login = {"HOME": str(prefix / "home"), "USER": user, "LOGNAME": user, "LANG": "C.UTF-8"}
    settings = [f"{name}={value}" for name, value in (login | dict(env)).items()]
    enter = ["bash", "-c", '. "$0"; exec "$@"', str(env_file or prefix / "env.sh")]
    full = ["runuser", "-u", user, "--", "env", "-i", *settings, *enter, *argv]
    with subprocess.Popen(
        full, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    done = subprocess.CompletedProcess(full, process.returncode, out, err)
    assert not check or done.returncode == 0, (
        f"exit code {done.returncode} from: {shlex.join(argv)}\n--- stdout ---\n{out}\n--- stderr ---\n{err}"
    )
    return done


def copy_tree(shared: Path, user: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="checkout-", dir=shared))
    for file in tracked_files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / file, target, follow_symlinks=False)
    folder.chmod(0o755)
    subprocess.run(["chown", "-R", f"{user}:{user}", str(folder)], check=True)
    return folder


def tracked_files() -> list[str]:
    """Tracked and new files that are not ignored; without git, everything but caches."""
    command = ["git", "-C", str(REPO), "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode == 0:
        return [name for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]
    files = (path.relative_to(REPO) for path in REPO.rglob("*") if path.is_file())
    return [str(path) for path in files if not any(part.startswith(CACHES) for part in path.parts)]


def require_machine() -> None:
    """Raises ClusterUnavailable unless this is a Debian 12 where we are root and may mount by FUSE."""
    if os.geteuid() != 0:
        raise ClusterUnavailable("not root (they install packages and start daemons)")
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    if 'VERSION_ID="12"' not in release or "ID=debian" not in release:
        raise ClusterUnavailable("not Debian 12 (they install its packages)")
    if not Path("/dev/fuse").exists():
        raise ClusterUnavailable("no /dev/fuse (Apptainer mounts by it)")


def prefix() -> Path:
    return Path(os.environ.get("BBU_TESTBED", "/opt/bbu-testbed"))


def script(name: str, *arguments: str) -> str:
    """Run up.sh or down.sh and return what it said."""
    done = subprocess.run([str(HERE / name), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"tests/cluster/{shlex.join([name, *arguments])} failed: {done.stdout}{done.stderr}"
    return done.stdout


def build_image(root: Path, user: str, checkout: Path) -> Path:
    """The CPU image for this working tree, built by the ordinary user, or found in the testbed's cache."""
    build_environment = {name: value for name, value in os.environ.items() if name.startswith(BUILD_ENVIRONMENT)}
    done = run_as(root, user, ["containers/build.sh", "cpu"], checkout, build_environment, timeout=3600, check=True)
    image = Path(done.stdout.strip())
    _remove_old_images(image)
    return image


def _remove_old_images(image: Path) -> None:
    """Remove images of former code from the cache, where each change of the code leaves one of 700 MB.

    Images that were used within a day stay: another session may run in one.
    """
    os.utime(image)
    for file in image.parent.glob("bbu-cpu-*"):
        if time.time() - file.stat().st_mtime > IMAGE_LIFETIME_S and not file.name.startswith(image.stem):
            file.unlink(missing_ok=True)
