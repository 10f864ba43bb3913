"""The doctor's judgement of what lies between the nodes, from the log of NCCL."""

from __future__ import annotations

from collections import Counter

import pytest

from bbu.doctor.findings import OK, WARNING
from bbu.doctor.network import _nccl_transport, connection_findings
from tests.doctor.findings import the_finding
from tests.doctor.reports import two_tasks

IB_LOG = """
n1:985:1010 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB ib0:10.1.0.1<0>
n1:985:1010 [0] NCCL INFO Using network IB
n1:985:1263 [0] NCCL INFO Channel 07/0 : 0[0] -> 2[0] [receive] via NET/IB/3/GDRDMA
n1:985:1263 [1] NCCL INFO Channel 01/0 : 3[1] -> 1[1] [send] via NET/IB/2/GDRDMA
n1:985:1263 [1] NCCL INFO Channel 00/0 : 3[1] -> 2[0] via P2P/CUMEM
n1:985:1263 [1] NCCL INFO Channel 01/0 : 3[1] -> 2[0] via P2P/CUMEM/read
"""
SOCKET_LOG = """
n1:985:1010 [0] NCCL INFO NET/IB : No device found.
n1:985:1010 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
n1:985:1010 [0] NCCL INFO Using network Socket
n1:985:1263 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""
OLD_LOG = "nodea:26799:27030 [4] NCCL INFO Channel 00 : 4[89000] -> 3[4d000] via P2P/direct pointer/read\n"


def test_the_log_of_nccl_is_read():
    ways = {"NET/IB/GDRDMA": 2, "P2P/CUMEM": 2}
    assert (_nccl_transport(IB_LOG).network, _nccl_transport(IB_LOG).ways) == ("IB", Counter(ways))
    assert _nccl_transport(SOCKET_LOG).has_sockets and not _nccl_transport(IB_LOG).has_sockets
    assert _nccl_transport(OLD_LOG).ways == Counter({"P2P/direct": 1})
    assert _nccl_transport("").network is None


@pytest.mark.parametrize(
    "log, status, line",
    [
        (IB_LOG, OK, "transport: NET/IB/GDRDMA (4), P2P/CUMEM (4); network IB"),
        (SOCKET_LOG, WARNING, "NCCL connects the nodes by plain sockets"),
        (IB_LOG.replace("P2P/CUMEM", "SHM/direct"), WARNING, "GPUs of a node exchange data through host memory"),
    ],
)
def test_the_transport_of_nccl(log: str, status: str, line: str):
    reduced = {"reduced": {"backend": "nccl", "log": log}}
    finding = the_finding(connection_findings(two_tasks(reduced, reduced)), line)
    assert finding.status == status
