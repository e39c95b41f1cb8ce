"""Channels over RDMA against a model of a NIC, in C++: no device is needed."""

import subprocess
from pathlib import Path

import pytest


def test_bytes_that_arrive_in_any_order_and_readers_that_sleep(tmp_path):
    header = ["g++", "-E", "-include", "infiniband/verbs.h", "-x", "c++", "/dev/null"]
    if subprocess.run(header, capture_output=True, timeout=60).returncode != 0:
        pytest.skip("no infiniband/verbs.h: `make rdma` installs it")
    here = Path(__file__).parent
    calls = here.parent.parent / "custom_calls"
    sources = [calls / f"{name}.cc" for name in ("channel_end", "verbs_channel", "verbs_events", "wording")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", f"-I{calls}"]
    binary = tmp_path / "verbs_order"
    build = ["g++", *flags, str(here / "verbs_order.cc"), *map(str, sources), "-o", str(binary), "-lpthread"]
    subprocess.run(build, check=True, timeout=240)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=240)
    names = (
        "WholeMessagesOnly",
        "Sleepers",
        "RingsOfFewSlots",
        "ReaderBehind",
        "SleeperIsWoken",
        "PollerIsNot",
        "LateWordIsNoHarm",
        "LargeMessageWakesUntold",
        "ClosedInFlight",
        "OtherSizeIsSaid",
    )
    lines = [f"{name}: good" for name in names]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines), done.stdout + done.stderr
