"""What lies between the nodes: the shared filesystem under contention, the network, the exit code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bbu.doctor.findings import Finding, failure, ok, warning
from bbu.doctor.launch import Outcome
from bbu.doctor.report import FileFacts, ReduceFacts, TaskReport, files_of, reduced_of
from bbu.errors import PREEMPTED_EXIT_CODE

_SLOW_VISIBILITY_S = 5


def connection_findings(outcome: Outcome) -> Iterator[Finding]:
    """Judge what all tasks did together. A stage that a task did not reach is reported with its node, not here."""
    reports = [report for _, report in sorted(outcome.reports.items())]
    files, reduced = files_of(reports), reduced_of(reports)
    if len(files) == outcome.tasks > 1:
        yield from _sharing_findings(files)
    if len(reduced) == outcome.tasks and all(each.torch for each in reduced):
        yield from _sum_findings(reports, reduced)
    stops = [report.stop for report in reports if report.stop]
    if len(stops) == outcome.tasks and all(stop.signal and not stop.image_error for stop in stops):
        yield _code_finding(outcome)


def _sharing_findings(files: Sequence[FileFacts]) -> Iterator[Finding]:
    if not all(each.met for each in files):
        remedy = "choose a work_folder on one filesystem that all nodes see, without long attribute caching"
        yield failure("the tasks did not see each other's files", remedy)
        return
    yield _link_finding(files)
    broken = [text for each in files for text in each.broken_reads]
    delay = max(each.visible_s for each in files)
    if broken:
        remedy = "keep runs on another filesystem: one that replaces a file in one step (POSIX rename)"
        yield failure(f"a file was missing or incomplete while it was replaced: {broken[0]}", remedy)
    elif delay > _SLOW_VISIBILITY_S:
        remedy = "nothing must be done; mounting without attribute caching (noac, or actimeo=1) makes it quicker"
        yield warning(f"a replaced file was seen by all tasks and answered only after {delay:.1f} s", remedy)
    else:
        yield ok(f"a replaced file was seen by all tasks and answered within {delay * 1000:.0f} ms")


def _link_finding(files: Sequence[FileFacts]) -> Finding:
    winners, errors = sum(each.won for each in files), [each.link_error for each in files if each.link_error]
    if winners == 1 and not errors:
        return ok(f"hard links are exclusive: 1 of {len(files)} tasks won the race for a name")
    remedy = "keep runs on another filesystem: leases and the eval ledger need hard links (NFS, Lustre, GPFS)"
    why = f": {errors[0]}" if errors else ""
    return failure(f"hard links: {winners} tasks won a race that one must win{why}", remedy)


def _sum_findings(reports: Sequence[TaskReport], reduced: Sequence[ReduceFacts]) -> Iterator[Finding]:
    pairs = zip(reports, reduced, strict=True)
    errors = [f"task {report.rank} on {report.node.name}: {each.error}" for report, each in pairs if each.error]
    backend = reduced[0].backend
    if errors:
        remedy = "state network_interface (ip addr on a node lists them), and master_suffix if the fast network has " \
            "names of its own; a firewall between nodes must let ports 20000 to 29999 pass"  # fmt: skip
        yield failure(f"the tasks could not sum a tensor over {backend}: {errors[0]}", remedy)
        return
    if not all(each.correct for each in reduced):
        yield failure(f"a sum over {backend} was wrong", "do not train here; show this to the administrators")
        return
    slowest_s, size = max(each.seconds for each in reduced), reduced[0].megabytes
    rate = f"{size / 1000 / slowest_s:.2f} GB/s"
    yield ok(f"{len(reduced)} tasks summed {size} MB over {backend} in {slowest_s * 1000:.0f} ms ({rate}), correctly")
    yield _nccl_finding(reports, reduced) if backend == "nccl" else _gloo_finding(reports, reduced)


def _gloo_finding(reports: Sequence[TaskReport], reduced: Sequence[ReduceFacts]) -> Finding:
    """gloo uses TCP alone, by the interface that the profile states, else by the one of the host's name."""
    nodes = [report.node for report in reports]
    stated = {each.interface for each in reduced if each.interface is not None}
    names = stated or {_interface_of(node.host_address, node.interfaces) for node in nodes}
    addresses = {node.interfaces.get(name, node.host_address) for node in nodes for name in names}
    return ok(f"transport: gloo over TCP by {', '.join(sorted(names))} ({', '.join(sorted(addresses))})")


def _interface_of(address: str, interfaces: Mapping[str, str]) -> str:
    """The interface with this address. Debian gives a host's name 127.0.1.1, which is on lo and listed nowhere."""
    loopback = "lo" if address.startswith("127.") else "?"
    return next((name for name, listed in interfaces.items() if listed == address), loopback)


@dataclass(frozen=True)
class _NcclTransport:
    """What NCCL's log says about its connections."""

    network: str | None
    """Between nodes: IB, Socket or the name of a plugin; None where the log does not name it."""
    ways: Counter[str]
    """Number of connections by each way, such as P2P/CUMEM."""

    @property
    def has_sockets(self) -> bool:
        """Whether plain sockets connect nodes."""
        return self.network == "Socket" or any(way.startswith("NET/Socket") for way in self.ways)


def _nccl_transport(log: str) -> _NcclTransport:
    """Read a log that NCCL wrote with NCCL_DEBUG=INFO. The forms of several versions of NCCL are known."""
    network = re.search(r"NCCL INFO Using network (\S+)", log) or re.search(r"NCCL INFO NET/(\w+) : Using \[", log)
    ways = re.findall(r"Channel \d+(?:/\d+)? : \d+\[\w+\] -> \d+\[\w+\] (?:\[(?:send|receive)\] )?via (\S+)", log)
    return _NcclTransport(network[1] if network else None, Counter(_short_way(way) for way in ways))


def _short_way(way: str) -> str:
    """`NET/IB/3/GDRDMA` is NET/IB/GDRDMA, whichever adapter; `P2P/CUMEM/read` is P2P/CUMEM."""
    kind, *rest = [part for part in way.split("/") if not re.fullmatch(r"\d+(\(\d+\))?", part)]
    return "/".join([kind, *rest][: 3 if kind == "NET" else 2])


def _nccl_finding(reports: Sequence[TaskReport], reduced: Sequence[ReduceFacts]) -> Finding:
    transports = [_nccl_transport(each.log) for each in reduced]
    ways = sum((each.ways for each in transports), Counter[str]())
    nodes = len({report.node.name for report in reports})
    counts = ", ".join(f"{way} ({count})" for way, count in ways.most_common()) or "not in NCCL's log"
    network = next((each.network for each in transports if each.network), None)
    text = f"transport: {counts}{f'; network {network}' if network and nodes > 1 else ''}"
    if nodes > 1 and any(each.has_sockets for each in transports):
        return warning(
            f"{text}: NCCL connects the nodes by plain sockets",
            "if the nodes have InfiniBand or RoCE: ibv_devinfo must work inside the container (rdma-core in the image, "
            "/dev/infiniband on the nodes); NCCL_DEBUG=INFO under environment shows NCCL's reasons",
        )
    if any(way.startswith("SHM") for way in ways):
        return warning(
            f"{text}: GPUs of a node exchange data through host memory",
            "nvidia-smi topo -m shows how they are connected; GPUs must be requested per node, never per task",
        )
    return ok(text)


def _code_finding(outcome: Outcome) -> Finding:
    """Slurm must pass on the exit code that asks for a requeue."""
    if outcome.code == PREEMPTED_EXIT_CODE:
        return ok(f"the exit code {PREEMPTED_EXIT_CODE} came back")
    remedy = "see the tasks' output in the folder named below; a site's own epilog may change exit codes"
    return failure(f"the job ended with {PREEMPTED_EXIT_CODE}, but {outcome.code} came back", remedy)
