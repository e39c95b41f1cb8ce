"""Records when the sends and receives of this process began, waited and ended."""

import dataclasses

import numpy as np

from lamina_jax import _custom_calls

EVENT_DTYPE = np.dtype(
    [
        ("start_ns", np.int64),  # the call was entered
        ("ready_ns", np.int64),  # its wait was over
        ("end_ns", np.int64),  # the tensors were copied
        ("channel", np.int64),  # Channel.id
        ("tag", np.int32),
        ("step", np.int32),
        ("layer", np.int32),
        ("batch", np.int32),
        ("is_recv", np.uint32),
        ("unused", np.uint32),
    ]
)
"""One send or recv that succeeded. Times are of CLOCK_MONOTONIC, which all processes of a host share."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """What happened in this process.

    Attributes:
        events: [N] of EVENT_DTYPE, in order of their ends.
        dropped: How many more there were when the buffer was full.
    """

    events: np.ndarray
    dropped: int


def start_recording(capacity: int) -> None:
    """Starts over with room for `capacity` events of 56 bytes; later ones are counted and dropped.

    Raises:
        ValueError: `capacity` is not positive.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    _custom_calls.start_timeline(capacity)


def stop_recording() -> Recording:
    """What is left to drain; from now on nothing is recorded."""
    recording = drain_recording()
    _custom_calls.start_timeline(0)
    return recording


def drain_recording() -> Recording:
    """What was recorded since the last drain. The recording goes on, with an empty buffer."""
    data, dropped = _custom_calls.drain_timeline()
    return Recording(np.frombuffer(data, EVENT_DTYPE), dropped)
