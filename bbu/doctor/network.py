"""What lies between the nodes: the shared filesystem under contention, the network, the exit code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bbu.doctor.findings import Finding, failure, ok, warning
from bbu.doctor.launch import Outcome, Report
from bbu.errors import PREEMPTED_EXIT_CODE

SLOW_VISIBILITY_S = 5


def between(outcome: Outcome) -> Iterator[Finding]:
    """Only what all tasks got to: where one fell behind, its node says so."""
    reports = [report for _, report in sorted(outcome.reports.items())]
    if all("met" in report for report in reports) and len(reports) == outcome.tasks > 1:
        yield from sharing_findings(reports)
    reduced = [report["reduce"] for report in reports if "reduce" in report]
    if reduced and all(each["torch"] for each in reduced) and len(reduced) == outcome.tasks:
        yield from reduce_findings(reports)
    if all(report.get("signal") and not report["image_error"] for report in reports) and len(reports) == outcome.tasks:
        yield code_finding(outcome)


def sharing_findings(reports: Sequence[Report]) -> Iterator[Finding]:
    if not all(report["met"] for report in reports):
        remedy = "choose a work_folder on one filesystem that all nodes see, without long attribute caching"
        yield failure("the tasks did not see each other's files", remedy)
        return
    winners, errors = sum(r["won"] for r in reports), [r["link_error"] for r in reports if "link_error" in r]
    if winners == 1 and not errors:
        yield ok(f"hard links are exclusive: 1 of {len(reports)} tasks won the race for a name")
    else:
        remedy = "keep runs on another filesystem: leases and the eval ledger need hard links (NFS, Lustre, GPFS)"
        why = f": {errors[0]}" if errors else ""
        yield failure(f"hard links: {winners} tasks won a race that one must win{why}", remedy)
    broken = [text for report in reports for text in report.get("broken_reads", [])]
    delay = max(report.get("visible_s", 0) for report in reports)
    if broken:
        remedy = "keep runs on another filesystem: one that replaces a file in one step (POSIX rename)"
        yield failure(f"a file was missing or in parts while it was replaced: {broken[0]}", remedy)
    elif delay > SLOW_VISIBILITY_S:
        remedy = "nothing must be done; mounting without attribute caching (noac, or actimeo=1) makes it quicker"
        yield warning(f"a replaced file was seen by all tasks and answered only after {delay:.1f} s", remedy)
    else:
        yield ok(f"a replaced file was seen by all tasks and answered within {delay * 1000:.0f} ms")


def reduce_findings(reports: Sequence[Report]) -> Iterator[Finding]:
    facts = [report["reduce"] for report in reports]
    errors = [f"task {r['rank']} on {r['node']}: {r['reduce']['error']}" for r in reports if r["reduce"]["error"]]
    backend = facts[0]["backend"]
    if errors:
        remedy = "state network_interface (ip addr on a node lists them), and master_suffix if the fast network has " \
            "names of its own; a firewall between nodes must let ports 20000 to 29999 pass"  # fmt: skip
        yield failure(f"the tasks could not sum a tensor over {backend}: {errors[0]}", remedy)
        return
    if not all(each["correct"] for each in facts):
        yield failure(f"a sum over {backend} was wrong", "do not train here; show this to the administrators")
        return
    took, size = max(each["seconds"] for each in facts), facts[0]["megabytes"]
    rate = f"{size / 1000 / took:.2f} GB/s"
    yield ok(f"{len(facts)} tasks summed {size} MB over {backend} in {took * 1000:.0f} ms ({rate}), correctly")
    yield from nccl_findings(reports) if backend == "nccl" else gloo_findings(reports)


def gloo_findings(reports: Sequence[Report]) -> Iterator[Finding]:
    """gloo speaks TCP alone; which interface is what the profile states, or the one of the host's own name."""
    wanted = {report["reduce"]["interface"] for report in reports} - {None}
    used = wanted or {name_of(report["own_address"], report["interfaces"]) for report in reports}
    addresses = {report["interfaces"].get(name, report["own_address"]) for report in reports for name in used}
    told = f"transport: gloo over TCP by {', '.join(sorted(used))} ({', '.join(sorted(addresses))})"
    yield ok(told)


def name_of(ip: str, interfaces: Mapping[str, str]) -> str:
    return next((name for name, own in interfaces.items() if own == ip), "lo" if ip.startswith("127.") else "?")


@dataclass(frozen=True)
class NcclTransport:
    """What NCCL's log says: its network (IB, Socket, a plugin), and how many connections go by each way."""

    network: str | None
    ways: Counter[str]

    @property
    def has_sockets(self) -> bool:
        return self.network == "Socket" or any(way.startswith("NET/Socket") for way in self.ways)


def nccl_transport(log: str) -> NcclTransport:
    """Read a log that NCCL_DEBUG=INFO wrote."""
    network = re.search(r"NCCL INFO Using network (\S+)", log) or re.search(r"NCCL INFO NET/(\w+) : Using \[", log)
    found = re.findall(r"Channel \d+(?:/\d+)? : \d+\[\w+\] -> \d+\[\w+\] (?:\[(?:send|receive)\] )?via (\S+)", log)
    return NcclTransport(network[1] if network else None, Counter(short_way(way) for way in found))


def short_way(way: str) -> str:
    """`NET/IB/3/GDRDMA` is NET/IB/GDRDMA, whichever adapter; `P2P/CUMEM/read` is P2P/CUMEM."""
    kind, *rest = [part for part in way.split("/") if not re.fullmatch(r"\d+(\(\d+\))?", part)]
    return "/".join([kind, *rest][: 3 if kind == "NET" else 2])


def nccl_findings(reports: Sequence[Report]) -> Iterator[Finding]:
    transports = [nccl_transport(report["reduce"]["log"]) for report in reports]
    ways = sum((each.ways for each in transports), Counter[str]())
    nodes = len({report["node"] for report in reports})
    told = ", ".join(f"{way} ({count})" for way, count in ways.most_common()) or "not told in NCCL's log"
    network = next((each.network for each in transports if each.network), None)
    told = f"transport: {told}{f'; network {network}' if network and nodes > 1 else ''}"
    if nodes > 1 and any(each.has_sockets for each in transports):
        yield warning(
            f"{told}: NCCL goes between the nodes by plain sockets",
            "if the nodes have InfiniBand or RoCE: ibv_devinfo must work inside the container (rdma-core in the image, "
            "/dev/infiniband on the nodes); NCCL_DEBUG=INFO under environment shows NCCL's reasons",
        )
    elif any(way.startswith("SHM") for way in ways):
        yield warning(
            f"{told}: GPUs of a node talk through host memory",
            "nvidia-smi topo -m shows how they are connected; GPUs must be asked for per node, never per task",
        )
    else:
        yield ok(told)


def code_finding(outcome: Outcome) -> Finding:
    """Slurm must pass on the code that asks to be put back into the queue."""
    if outcome.code == PREEMPTED_EXIT_CODE:
        return ok(f"the exit code {PREEMPTED_EXIT_CODE} came back")
    remedy = "see the tasks' output in the folder named below; a site's own epilog may change exit codes"
    return failure(f"the job ended with {PREEMPTED_EXIT_CODE}, but {outcome.code} came back", remedy)
