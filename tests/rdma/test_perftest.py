"""What is read off the output of perftest."""

import sys

import pytest

from lamina_jax.testing.rdma.perftest import (
    parse_bandwidth,
    parse_latency,
    write_latency,
)

LATENCY = """\
---------------------------------------------------------------------------------------
                    RDMA_Write Latency Test
 Dual-port       : OFF		Device         : rxe0
 Number of qps   : 1		Transport type : IB
 Connection type : RC		Using SRQ      : OFF
 PCIe relax order: OFF
 ibv_wr* API     : OFF
 TX depth        : 1
 Mtu             : 4096[B]
 Link type       : Ethernet
 GID index       : 1
 Max inline data : 0[B]
 rdma_cm QPs	 : OFF
 Data ex. method : Ethernet
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0016 PSN 0xe1fff7 RKey 0x000777 VAddr 0x005592861d4000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:99:00:01
 remote address: LID 0000 QPN 0x0015 PSN 0x690412 RKey 0x000690 VAddr 0x005563f8079000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:99:00:01
---------------------------------------------------------------------------------------
 #bytes #iterations t_min[usec] t_max[usec] t_typical[usec] t_avg[usec] \
t_stdev[usec] 99% percentile[usec] 99.9% percentile[usec]
 32768   300          592.63         2598.42      756.80   	       773.46      	145.06 		1512.55 		2598.42
---------------------------------------------------------------------------------------
"""
BANDWIDTH = """\
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF		Device         : rxe0
 Number of qps   : 1		Transport type : IB
 Connection type : RC		Using SRQ      : OFF
 PCIe relax order: ON
 ibv_wr* API     : OFF
 TX depth        : 128
 Mtu             : 4096[B]
 Link type       : Ethernet
 GID index       : 1
 Max inline data : 0[B]
 rdma_cm QPs	 : OFF
 Data ex. method : Ethernet
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0017 PSN 0x1a9422 RKey 0x00083b VAddr 0x007f70b9864000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:99:00:01
 remote address: LID 0000 QPN 0x0018 PSN 0x4d7e68 RKey 0x0009ad VAddr 0x007f67f1cbd000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:99:00:01
---------------------------------------------------------------------------------------
 #bytes #iterations BW peak[MB/sec] BW average[MB/sec] MsgRate[Mpps]
 1048576    200              44.84              43.07  		   0.000045
---------------------------------------------------------------------------------------
"""


def test_latency():
    assert parse_latency(LATENCY) == 756.80


def test_latency_without_a_standard_deviation():
    assert parse_latency(LATENCY.replace("145.06", "-nan")) == 756.80


def test_bandwidth():
    assert parse_bandwidth(BANDWIDTH) == 43.07


@pytest.mark.parametrize("parse", [parse_latency, parse_bandwidth])
def test_output_without_figures(parse):
    with pytest.raises(
        ValueError, match=r"expected one row of \d figures from ib_write_\w+, got 0 in\nCouldn't connect"
    ):
        parse("Couldn't connect to 10.99.0.2:18515\n")


PROGRAM = """
import socket, sys
port = int(sys.argv[sys.argv.index("-p") + 1])
if sys.argv[-1] == "127.0.0.1":
    socket.create_connection((sys.argv[-1], port), timeout=20).close()
    print({figures!r})
else:
    {serve}
"""
SERVE = 'socket.create_server(("127.0.0.1", port)).accept()[0].close()'
HERE = {"device": "mlx5_0", "gid_index": 3, "nbytes": 32768, "iterations": 300}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a program in the place of ib_write_lat; `serve` is what it does without an address."""

    def install(serve: str) -> None:
        program = tmp_path / "ib_write_lat"
        program.write_text(f"#!{sys.executable}\n{PROGRAM.format(figures=LATENCY, serve=serve)}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


def test_latency_within_this_host(install):
    install(SERVE)
    assert write_latency(**HERE) == 756.80


def test_server_that_ends_is_quoted(install):
    install('sys.exit("no such device")')
    with pytest.raises(OSError, match=r"ib_write_lat does not listen on port \d+: no such device"):
        write_latency(**HERE)


def test_without_perftest_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="no ib_write_lat: install perftest"):
        write_latency(**HERE)
