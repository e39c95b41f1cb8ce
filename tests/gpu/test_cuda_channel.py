"""Channels of GPUs, on a GPU: what tests/transport/test_channel.py asks of the kinds that run without one.

A process with a GPU is on one side; on the other is a process without (cuda_host) or with the same GPU (cuda_ipc). The
process that runs the tests only gives orders. Two processes take turns on a GPU, so how long cuda_ipc takes here says
nothing about two GPUs, or about MPS.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from channel_peer import DTYPES, Mail, Peer, running_peer

from lamina_jax.transport import Role, Tag, cuda

pytestmark = pytest.mark.skipif(cuda.cuda_device_count() == 0, reason="needs a GPU and a build with nvcc")

# Programs become CUDA graphs however small they are, and processes share the GPU's memory.
SETTINGS = {
    "XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
PLATFORMS = {"cuda_host": "cpu", "cuda_ipc": "cuda,cpu"}
"""By kind, what the other side runs on."""


@dataclasses.dataclass(frozen=True)
class Sides:
    """The two processes; the first has the GPU and makes the channels."""

    kind: str
    gpu: Peer
    other: Peer

    def connect(self, role: Role, **options) -> tuple[int, int]:
        """The numbers of both ends; `role` is that of the first."""
        options = {"slot_bytes": 1 << 20, "num_slots": 4, "timeout_s": 30.0, "device": 0} | options
        mine, address = self.gpu.create(self.kind, role, **options)
        theirs = self.other.attach(address)
        self.gpu.do("connect", mine, self.other.do("answer", theirs))
        return mine, theirs


def _sides(kind: str, name: str) -> Iterator[Sides]:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in SETTINGS.items():
            patch.setenv(variable, value)
        with running_peer(f"{name}-gpu", "cuda,cpu") as gpu, running_peer(f"{name}-other", PLATFORMS[kind]) as other:
            yield Sides(kind, gpu, other)


@pytest.fixture(scope="module", params=PLATFORMS)
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    yield from _sides(request.param, "cuda-channel")


@pytest.fixture
def mortal_sides(sides) -> Iterator[Sides]:
    """For tests that end or stop a process."""
    yield from _sides(sides.kind, "cuda-channel-mortal")


MAILS = {
    "every dtype": Mail(shapes=((3, 5), (7,), (2, 2, 2), (1,)), dtypes=DTYPES, tag=Tag.KV, step=3, layer=2, seed=1),
    "odd sizes": Mail(shapes=((), (0,), (33,), (1, 1)), dtypes=("bfloat16", "int32", "float16", "float32"), seed=2),
    "several blocks": Mail(shapes=((1000, 100), (77, 3)), dtypes=("bfloat16", "float32"), seed=3),
    "1 MB": Mail(shapes=((512, 1024),), dtypes=("bfloat16",), seed=4),
}


def assert_same(received, mails):
    for tensors, mail in zip(received, mails, strict=True):
        for got, expected in zip(tensors, mail.contents(), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mail", MAILS.values(), ids=MAILS)
def test_contents_arrive(sides, mail):
    """More messages than slots, both ways."""
    mails = [dataclasses.replace(mail, layer=layer, seed=layer) for layer in range(11)]
    there, their_there = sides.connect("writer")
    back, their_back = sides.connect("reader")
    sides.other.start("recv", their_there, [mails], [0])
    sides.gpu.do("send", there, [mails], [0])
    assert_same(sides.other.result(), mails)
    sides.other.start("send", their_back, [mails], [0])
    assert_same(sides.gpu.do("recv", back, [mails], [0]), mails)
    sides.other.result()


def test_loop_on_the_device(sides):
    mail = Mail(shapes=((300,), (5,)), dtypes=("float32", "int32"), seed=5)
    there, their_there = sides.connect("writer")
    back, their_back = sides.connect("reader")
    count = 100
    sides.other.start("echo", their_there, their_back, mail, count)
    got = sides.gpu.do("ping", there, back, mail, count)
    sides.other.result()
    for tensor, contents in zip(got, mail.contents(), strict=True):
        rounds = np.arange(count).reshape(-1, *[1] * contents.ndim).astype(contents.dtype)
        np.testing.assert_array_equal(tensor, contents[None] + rounds)


def test_graphs_are_replayed(sides):
    """The host stops making calls once the program is a graph, and every message is still the next one."""
    mail = Mail(shapes=((300,),), seed=6)
    there, their_there = sides.connect("writer")
    back, their_back = sides.connect("reader")
    count = 100
    sides.other.start("echo", their_there, their_back, mail, count)
    (got,), calls = sides.gpu.do("replay", there, back, mail, count)
    sides.other.result()
    np.testing.assert_array_equal(got, mail.contents()[0] + np.arange(count, dtype=np.float32)[:, None])
    assert calls < count, f"{calls} calls for {2 * count} sends and recvs: the program did not become a graph"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_graph_without_xla(tmp_path):
    """The raw benchmark checks every element of every message itself."""
    benchmark = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu_channel.py"
    rows = tmp_path / "rows.json"
    options = ["--kinds=", "--sizes=64,2048,1048576", "--raw_rounds=200", f"--json={rows}"]
    subprocess.run([sys.executable, str(benchmark), *options], check=True, timeout=300)
    assert [(row["num_bytes"], row["rounds"]) for row in json.loads(rows.read_text())] == [
        (64, 200),
        (2048, 200),
        (1048576, 200),
    ]


def test_each_batch_takes_its_own_channel(sides):
    ends = [sides.connect("writer") for _ in range(3)]
    mails = [Mail(batch=batch, seed=batch) for batch in (2, 0, 1)]
    sides.gpu.do("send_batches", [mine for mine, _ in ends], mails)
    assert_same(sides.other.do("recv_batches", [theirs for _, theirs in ends], mails), mails)


@pytest.mark.parametrize("batch", [-1, 1])
def test_batch_without_a_channel_is_an_error(sides, batch):
    mine, _ = sides.connect("writer")
    words = rf"send of 'q' \(step 0, layer 0, batch {batch}\) failed: the program has 1 channel\(s\), one per batch"
    with pytest.raises(AssertionError, match=words):
        sides.gpu.do("send_batches", [mine], [Mail(batch=batch)])


SENT = Mail(shapes=((4,), (8,)), dtypes=("float32", "float16"), step=5, layer=6, tag=Tag.KV)


@pytest.mark.parametrize(
    ("awaited", "words"),
    [
        ({"tag": Tag.Q}, r"expected 'q', got 'kv' \(step 5, layer 6, batch 0\)"),
        ({"step": 4}, "expected step 4, got 5"),
        ({"layer": 7}, "expected layer 7, got 6"),
        ({"shapes": ((4,),), "dtypes": ("float32",)}, "expected tensor count 1, got 2"),
        ({"shapes": ((40,), (8,))}, "expected payload bytes 256, got 128"),
        ({"dtypes": ("int32", "float16")}, "its tensors differ in dtype"),
    ],
)
def test_unexpected_message_is_an_error(sides, awaited, words):
    mine, theirs = sides.connect("reader")
    sides.other.do("send", theirs, [[SENT]], [0])
    with pytest.raises(AssertionError, match=words):
        sides.gpu.do("recv", mine, [[dataclasses.replace(SENT, **awaited)]], [0])


def test_first_failure_is_final(sides):
    mine, theirs = sides.connect("reader", timeout_s=0.25)
    words = r"recv of 'q' \(step 0, layer 5, batch 0\) from the test \(pid \d+\) failed: no message came in 0\.25 s"
    with pytest.raises(AssertionError, match=words):
        sides.gpu.do("recv", mine, [[Mail(layer=5)]], [0])
    start = time.monotonic()
    for layer in range(5):
        with pytest.raises(AssertionError, match=words):
            sides.gpu.do("recv", mine, [[Mail(layer=layer)]], [0])
    assert time.monotonic() - start < 5
    with pytest.raises(AssertionError, match=r"send of 'q'.*the peer has aborted the channel"):
        sides.other.do("send", theirs, [[Mail()]], [0])


def test_full_ring_is_a_deadline_error(sides):
    mine, _ = sides.connect("writer", num_slots=2, timeout_s=0.25)
    words = r"send of 'q' \(step 0, layer 2, batch 0\).*no slot of the ring came free in 0\.25 s"
    with pytest.raises(AssertionError, match=words):
        sides.gpu.do("send", mine, [[Mail(layer=layer) for layer in range(3)]], [0])


@pytest.mark.parametrize(
    ("ender", "how", "words"),
    [
        ("gpu", "abort", "this side has aborted the channel"),
        ("gpu", "close", "this side has closed the channel"),
        ("other", "abort", "the peer has aborted the channel"),
        ("other", "close", "the peer has closed the channel"),
    ],
)
def test_a_wait_is_ended(sides, ender, how, words):
    there, their_there = sides.connect("writer")
    back, their_back = sides.connect("reader")
    asked = Mail(step=12, layer=3)
    sides.gpu.do("ask_in_background", there, back, asked)
    sides.other.do("recv", their_there, [[asked]], [0])
    getattr(sides, ender).do("end", back if ender == "gpu" else their_back, how)
    error = sides.gpu.do("background_error")
    assert re.search(rf"recv of 'attended' \(step 12, layer 3, batch 0\) from the test.* failed: {words}", error)


def test_peer_killed_while_we_recv(mortal_sides):
    there, their_there = mortal_sides.connect("writer")
    back, _ = mortal_sides.connect("reader")
    asked = Mail(step=12, layer=3)
    mortal_sides.gpu.do("ask_in_background", there, back, asked)
    mortal_sides.other.start("recv_and_die", their_there, asked)
    mortal_sides.other.join()
    died = time.monotonic()
    error = mortal_sides.gpu.do("background_error")
    assert time.monotonic() - died < 2
    words = rf"from the test \(pid {mortal_sides.other.pid}\) failed: the peer process has died"
    assert re.search(words, error)


def test_messages_of_a_dead_peer_are_delivered(mortal_sides):
    mine, theirs = mortal_sides.connect("reader")
    mails = [Mail(layer=layer, seed=layer) for layer in range(3)]
    mortal_sides.other.start("send_and_die", theirs, mails)
    mortal_sides.other.join()
    assert_same(mortal_sides.gpu.do("recv", mine, [mails], [0]), mails)
    with pytest.raises(AssertionError, match=r"layer 3, batch 0\).*the peer process has died"):
        mortal_sides.gpu.do("recv", mine, [[Mail(layer=3)]], [0])


def test_stopped_peer_is_a_deadline_error(mortal_sides):
    if mortal_sides.kind == "cuda_ipc":
        pytest.skip("a stopped process keeps the GPU that it shares")
    mine, _ = mortal_sides.connect("reader", timeout_s=0.25)
    mortal_sides.other.signal(signal.SIGSTOP)
    with pytest.raises(AssertionError, match=r"no message came in 0\.25 s, though the peer process has not ended"):
        mortal_sides.gpu.do("recv", mine, [[Mail()]], [0])


def test_channels_come_and_go(sides):
    """Ends of closed channels are used again for others; nothing of the old ones is left in them."""
    for seed in range(80):
        mine, theirs = sides.connect("writer", slot_bytes=4096)
        mails = [Mail(seed=seed)]
        sides.gpu.do("send", mine, [mails], [0])
        assert_same(sides.other.do("recv", theirs, [mails], [0]), mails)
        sides.gpu.do("close", mine)
        sides.other.do("close", theirs)


def test_wrong_device_is_refused(sides):
    with pytest.raises(AssertionError, match=r"expected device to be the number of a GPU, 0 to \d+, got 99"):
        sides.connect("writer", device=99)
