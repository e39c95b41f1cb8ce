"""The gda kind of channel where there is neither GPU nor NIC: lowering, the exchange of addresses, what it chooses."""

import ctypes
import ipaddress
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import pytest

from lamina_jax.transport import (
    ChannelAddress,
    Tag,
    attach,
    channel_class,
    cuda,
    fence,
    gda,
    gda_link,
    make_stamp,
    recv,
    send,
)
from lamina_jax.transport.rc_queue_pair import QpAddress
from lamina_jax.transport.rdma_devices import RdmaPort, choose_port

needs_calls = pytest.mark.skipif(gda._calls is None, reason="built without nvcc")
without_gpu = pytest.mark.skipif(cuda.cuda_device_count() > 0, reason="there is a GPU")
ROUTE = QpAddress(qpn=7, psn=9, lid=0, gid=bytes(range(16)), mtu=5)


class FakeLink(gda_link.Link):
    """A connection that only notes what it was told."""

    made: list["FakeLink"]
    refuses: bool = False
    address: Any = None

    def __init__(self, **options):
        FakeLink.made.append(self)
        self.options, self.peer, self.closed = options, None, False
        self.address = msgspec.structs.replace(ROUTE, qpn=len(FakeLink.made))

    def connect(self, peer):
        if self.refuses:
            raise OSError(22, "the queue pair does not become RTR")
        self.peer = peer

    def close(self):
        self.closed = True


class FakeEnd(gda_link.GdaEnd):
    """The end of a ring whose other end is only known by address."""

    address: Any = None
    id: Any = 1 << 41
    failure: Any = None

    def __init__(self, link, *, role, peer, num_slots, slot_bytes, timeout_s):
        del peer, timeout_s
        self.link, self.peer, self.closed = link, None, False
        self.address = gda_link.RegionAddress(
            region=1 << 20, rkey=link.address.qpn * 100, num_slots=num_slots, slot_bytes=slot_bytes, role=role
        )

    def connect(self, peer):
        self.peer = peer

    def close(self):
        assert isinstance(self.link, FakeLink)
        assert not self.link.closed, "the end's memory must go before the connection"
        self.closed = True


class FakeCalls:
    def pci_bus_id(self, device):
        return f"0000:{device:02x}:00.0"


@pytest.fixture
def fakes(monkeypatch):
    FakeLink.made = []
    monkeypatch.setattr(gda, "Link", FakeLink)
    monkeypatch.setattr(gda, "GdaEnd", FakeEnd)
    monkeypatch.setattr(gda, "_calls", FakeCalls())
    chosen = []

    def choose(bus_id, *, nic):
        chosen.append((bus_id, nic))
        return RdmaPort(nic="mlx5_2", port=1, gid_index=3)

    monkeypatch.setattr(gda, "choose_port", choose)
    return chosen


def over_the_wire(address):
    assert address is not None
    return msgspec.msgpack.decode(msgspec.msgpack.encode(address), type=ChannelAddress)


def test_both_ends_learn_of_each_other(fakes):
    assert channel_class("gda") is gda.GdaChannel
    mine = gda.GdaChannel.create(role="writer", peer="the peer", messages=[], slot_bytes=100, device=1, nic="mlx5_2")
    assert (mine.connected, mine.answer, mine.slot_bytes) == (False, None, 128)
    theirs = attach(over_the_wire(mine.address), role="reader", peer="the creator", device=2)
    assert isinstance(theirs, gda.GdaChannel)
    assert (theirs.connected, theirs.address) == (True, mine.address)
    mine.connect(over_the_wire(theirs.answer))
    assert mine.connected
    here, there = FakeLink.made
    assert here.options == {"device": "mlx5_2", "gpu": 1, "port": 1, "gid_index": 3}
    assert fakes == [("0000:01:00.0", "mlx5_2"), ("0000:02:00.0", None)]
    assert (here.peer, there.peer) == (there.address, here.address)
    ends: list[Any] = [mine._end, theirs._end]
    assert [end.peer for end in ends] == [ends[1].address, ends[0].address]
    for channel in (mine, theirs):
        channel.close()
        channel.close()
        assert channel.closed
    assert here.closed
    assert there.closed


def test_refused_connection_leaves_nothing_open(fakes, monkeypatch):
    mine = channel_class("gda").create(role="reader", peer="the peer", messages=[])
    monkeypatch.setattr(FakeLink, "refuses", True)
    with pytest.raises(OSError, match="the queue pair does not become RTR"):
        attach(mine.address, role="writer", peer="the creator")
    assert [link.closed for link in FakeLink.made] == [False, True]
    with pytest.raises(OSError, match="does not become RTR"):
        mine.connect(mine.address)
    assert not mine.connected


def test_address_that_says_nothing(fakes):
    wrong = ChannelAddress(kind="gda", location="{}", num_slots=1, slot_bytes=64, creator_role="writer")
    with pytest.raises(ValueError, match=r"expected how to reach the creator's end of a gda channel, got '\{\}'"):
        attach(wrong, role="reader", peer="the creator")
    with pytest.raises(ValueError, match="expected an address of kind 'gda', got 'shm'"):
        gda.GdaChannel.attach(msgspec.structs.replace(wrong, kind="shm"), role="reader", peer="the creator")
    assert not FakeLink.made


@pytest.mark.usefixtures("fakes")
def test_what_pyverbs_raises_is_an_os_error(monkeypatch):
    class RefusedError(Exception):
        error_code = 12

    RefusedError.__module__ = "pyverbs.pyverbs_error"

    def refuse(*_, **__):
        raise RefusedError("Failed to register a MR")

    monkeypatch.setattr(gda, "GdaEnd", refuse)
    with pytest.raises(OSError, match="gda: Failed to register a MR") as error:
        gda.GdaChannel.create(role="writer", peer="the peer", messages=[])
    assert error.value.errno == 12
    assert FakeLink.made[0].closed


def test_built_without_cuda(monkeypatch):
    monkeypatch.setattr(gda, "_calls", None)
    with pytest.raises(OSError, match=r"gda needs the custom calls of CUDA, .* where nvcc is on the PATH"):
        channel_class("gda").create(role="writer", peer="the peer", messages=[])


@needs_calls
@without_gpu
def test_no_gpu():
    with pytest.raises(OSError, match="asking where the GPU is failed"):
        channel_class("gda").create(role="writer", peer="the peer", messages=[])


@needs_calls
@pytest.mark.usefixtures("fakes")
def test_programs_lower_for_cuda_without_a_gpu():
    writer = gda.GdaChannel.create(role="writer", peer="the peer", messages=[], slot_bytes=64)
    reader = attach(writer.address, role="reader", peer="the creator")
    writer.connect(reader.answer)

    def program(stamp, x):
        stamp = send([writer], stamp, [x], tag=Tag.Q)
        stamp, (x,) = fence(stamp, [x])
        (y,), stamp = recv([reader], stamp, [jax.ShapeDtypeStruct((4,), jnp.float32)], tag=Tag.ATTENDED)
        return x + y, stamp

    text = jax.jit(program).trace(make_stamp(0), jnp.zeros(4)).lower(lowering_platforms=("cuda",)).as_text()
    for target in ("lamina_gda_send", "lamina_fence", "lamina_gda_recv"):
        assert text.count(f"@{target}(") == 1


# --- Where the doorbell cannot be reached ----------------------------------------------------------------------------


class Queue:
    uses_proxy = True


class QueueCalls:
    """In place of `_gda_calls`; keeps what it was asked for."""

    def __init__(self):
        self.asked: list[dict] = []
        self.GpuQueue = self

    def make(self, **arguments):
        self.asked.append(arguments)
        return Queue()


class Mlx5:
    """In place of libmlx5: says where the queues of a queue pair are."""

    def mlx5dv_init_obj(self, obj, flags):
        assert flags.value == 3
        dv_qp = ctypes.cast(obj._obj.pointers[1], ctypes.POINTER(gda_link._DvQp)).contents
        dv_qp.dbrec, dv_qp.sq.buf, dv_qp.sq.wqe_cnt, dv_qp.sq.stride, dv_qp.bf_reg = 0x1000, 0x2000, 512, 64, 0x3800
        dv_cq = ctypes.cast(obj._obj.pointers[3], ctypes.POINTER(gda_link._DvCq)).contents
        dv_cq.dbrec, dv_cq.buf, dv_cq.cqe_cnt, dv_cq.cqe_size = 0x1040, 0x4000, 1024, 64
        return 0


def test_cpu_posts_and_says_so_once_per_gpu(caplog):
    gda_link._say_that_cpu_posts.cache_clear()
    calls = QueueCalls()
    with caplog.at_level(logging.WARNING, logger="absl"):
        for gpu in (4, 4, 5, 4):
            link: Any = object.__new__(gda_link.Link)
            link.gpu, link._calls, link._mlx5 = gpu, calls, Mlx5()
            link._qp = SimpleNamespace(pointer=0x88, number=77)
            assert link._describe_queue(0x99).uses_proxy
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "GPU 4 cannot reach the doorbell of its NIC",
        "GPU 5 cannot reach the doorbell of its NIC",
    ]
    assert "PeerMappingOverride=1" in caplog.records[0].getMessage()
    assert calls.asked[0] == {
        "device": 4,
        "wqes": 0x2000,
        "log_num_wqes": 9,
        "record": 0x1000,
        "doorbell": 0x3800,
        "cqes": 0x4000,
        "log_num_cqes": 10,
        "cq_record": 0x1040,
        "qpn": 77,
    }


# --- Which NIC -------------------------------------------------------------------------------------------------------

NEAR, FAR = "pci0000:00/0000:00:01.0", "pci0000:80/0000:80:01.0"
MAPPED = "0000:0000:0000:0000:0000:ffff:0a00:0001"
LINK_LOCAL = "fe80:0000:0000:0000:0000:0000:0000:0001"


class Machine:
    """A directory that looks like /sys with a GPU, "0000:1a:00.0", under NEAR."""

    def __init__(self, sys: Path):
        self.sys = sys
        self._link(sys / "bus/pci/devices/0000:1a:00.0", sys / "devices" / NEAR / "0000:1a:00.0")

    def add(self, name, bridge, gids=(), *, driver="mlx5_core", state="4: ACTIVE", link_layer="Ethernet"):
        device = self.sys / "devices" / bridge / name
        self._link(self.sys / "class/infiniband" / name / "device", device)
        (device / "driver").symlink_to(self.sys / "drivers" / driver)
        port = self.sys / "class/infiniband" / name / "ports/1"
        for folder in ("gids", "gid_attrs/types"):
            (port / folder).mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{link_layer}\n")
        for index, (kind, gid) in enumerate(gids):
            (port / f"gids/{index}").write_text(f"{gid}\n")
            (port / f"gid_attrs/types/{index}").write_text(f"{kind}\n")

    def _link(self, link, to):
        to.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(to)

    def choose(self, nic=None):
        return choose_port("0000:1A:00.0", nic=nic, sys=self.sys)


GIDS = [("IB/RoCE v1", LINK_LOCAL), ("RoCE v2", LINK_LOCAL), ("IB/RoCE v1", MAPPED), ("RoCE v2", MAPPED)]


def test_nearest_nic_with_an_active_port(tmp_path):
    machine = Machine(tmp_path)
    machine.add("mlx5_0", FAR, GIDS)
    machine.add("mlx5_1", NEAR, GIDS, state="1: DOWN")
    machine.add("mlx5_2", NEAR, GIDS)
    machine.add("mlx5_3", NEAR, GIDS)
    machine.add("bnxt_re0", NEAR, GIDS, driver="bnxt_en")
    assert machine.choose() == RdmaPort(nic="mlx5_2", port=1, gid_index=3)
    assert machine.choose("mlx5_0") == RdmaPort(nic="mlx5_0", port=1, gid_index=3)


@pytest.mark.parametrize(
    ("gids", "index"),
    [
        (GIDS[:2], 1),
        ([("RoCE v2", str(ipaddress.IPv6Address(0).exploded)), ("RoCE v2", LINK_LOCAL)], 1),
        ([*GIDS[:2], *[("RoCE v2", LINK_LOCAL)] * 9, ("RoCE v2", MAPPED)], 11),
    ],
)
def test_gid_on_ethernet(tmp_path, gids, index):
    machine = Machine(tmp_path)
    machine.add("mlx5_0", FAR, gids)
    assert machine.choose().gid_index == index


def test_infiniband_needs_no_gid(tmp_path):
    machine = Machine(tmp_path)
    machine.add("mlx5_0", FAR, link_layer="InfiniBand")
    assert machine.choose() == RdmaPort(nic="mlx5_0", port=1, gid_index=0)


@pytest.mark.parametrize("gids", [(), GIDS[:1]])
def test_no_port_names_what_there_is(tmp_path, gids):
    machine = Machine(tmp_path)
    machine.add("mlx5_0", NEAR, gids)
    machine.add("rxe0", NEAR, GIDS, driver="virtio_net")
    with pytest.raises(OSError, match=r"need an mlx5 NIC with an active port .*; RDMA devices: mlx5_0, rxe0"):
        machine.choose()
    with pytest.raises(OSError, match=r"need mlx5_7 to be an mlx5 NIC .*; RDMA devices: none"):
        machine.choose("mlx5_7")
