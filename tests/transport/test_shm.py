"""What only shared memory channels promise."""

import errno
import os
import pathlib
import stat
import subprocess

import msgspec
import pytest

from lamina_jax.transport import ShmChannel


@pytest.fixture
def ring():
    with ShmChannel.create(role="writer", peer="the peer", messages=[], slot_bytes=1000, num_slots=3) as channel:
        yield channel


def test_memory_has_no_name_and_one_user(ring):
    status = os.stat(ring.address.location)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0
    assert status.st_blocks * 512 >= status.st_size
    assert status.st_ino not in [file.inode() for file in os.scandir("/dev/shm")]


def test_memory_goes_with_the_channel(ring):
    location = ring.address.location
    memory = os.stat(location).st_ino
    ring.close()
    assert not os.path.exists(location) or os.stat(location).st_ino != memory


def test_more_memory_than_there_is_fails_at_once():
    total = os.statvfs("/dev/shm")
    slot_bytes = 1 << 30
    num_slots = 2 * total.f_blocks * total.f_frsize // slot_bytes + 1
    with pytest.raises(OSError, match=r"cannot reserve .* bytes of shared memory in /dev/shm") as error:
        ShmChannel.create(role="writer", peer="the peer", messages=[], slot_bytes=slot_bytes, num_slots=num_slots)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize(("name", "value"), [("num_slots", 4), ("slot_bytes", 64)])
def test_attach_compares_sizes(ring, name, value):
    wrong = msgspec.structs.replace(ring.address, **{name: value})
    with pytest.raises(ValueError, match=r"the ring at .* has another size in bytes: expected .*, got"):
        ShmChannel.attach(wrong, role="reader", peer="the peer")


def test_attach_compares_shape_of_equal_size():
    # 2 slots of 64 + 64 bytes are as long as one of 64 + 192.
    with ShmChannel.create(role="writer", peer="the peer", messages=[], slot_bytes=192, num_slots=1) as channel:
        wrong = msgspec.structs.replace(channel.address, num_slots=2, slot_bytes=64)
        with pytest.raises(ValueError, match="another number of slots: expected 2, got 1"):
            ShmChannel.attach(wrong, role="reader", peer="the peer")


def test_attach_to_something_else(ring, tmp_path):
    size = os.stat(ring.address.location).st_size
    (tmp_path / "file").write_bytes(bytes(size))
    wrong = msgspec.structs.replace(ring.address, location=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="has another magic number"):
        ShmChannel.attach(wrong, role="reader", peer="the peer")


def test_attach_to_nothing(ring):
    wrong = msgspec.structs.replace(ring.address, location="/proc/0/fd/3")
    with pytest.raises(FileNotFoundError, match="cannot open the ring of the peer at /proc/0/fd/3"):
        ShmChannel.attach(wrong, role="reader", peer="the peer")


def test_attach_to_another_kind(ring):
    wrong = msgspec.structs.replace(ring.address, kind="verbs")
    with pytest.raises(ValueError, match="expected an address of kind 'shm', got 'verbs'"):
        ShmChannel.attach(wrong, role="reader", peer="the peer")


def test_address_survives_a_control_connection(ring):
    encoded = msgspec.msgpack.encode(ring.address)
    assert msgspec.msgpack.decode(encoded, type=type(ring.address)) == ring.address


@pytest.mark.parametrize(
    ("program", "lines"),
    [
        ("ring_race", ["20000 messages, aborted: 1"]),
        (
            "gpu_end_race",
            [
                f"{name}: good"
                for name in (
                    "GpuToCpu",
                    "CpuToGpu",
                    "GpuToGpu",
                    "Timeouts",
                    "StopsWhileWaiting",
                    "WhatWasSentIsDelivered",
                    "StoppedBefore",
                    "UnexpectedMessage",
                    "BatchWithoutChannel",
                    "ClosedEnd",
                    "TooLarge",
                )
            ],
        ),
    ],
)
def test_ring_under_thread_sanitizer(tmp_path, program, lines):
    here = pathlib.Path(__file__).parent
    calls = here.parent.parent / "custom_calls"
    sources = [here / f"{program}.cc", calls / "channel_end.cc", calls / "shm_channel.cc", calls / "wording.cc"]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread"]
    flags += ["-Wl,--wrap=mmap,--wrap=munmap", f"-I{calls}", f"-I{calls / 'cuda'}"]
    binary = tmp_path / program
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(binary)], check=True, timeout=120)
    # -R: the sanitizer of older compilers does not know how far newer kernels spread addresses.
    done = subprocess.run(["setarch", "-R", str(binary)], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.splitlines()) == (0, lines), done.stdout + done.stderr
