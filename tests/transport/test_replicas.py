"""Channels between devices of one process, which replicas of the model worker use."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("scene", "num_devices"), [("ping_pong", 2), ("all_but_one_blocked", 2), ("all_but_one_blocked", 3)]
)
def test_devices_of_one_process(scene, num_devices):
    """A process of its own: the number of devices is fixed when JAX starts."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("replicas.py")), scene, str(num_devices)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
