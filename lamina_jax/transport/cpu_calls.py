"""The custom calls of every end of a channel that a CPU operates, whatever carries its messages."""

from typing import Final, Literal

import jax

from lamina_jax import _custom_calls
from lamina_jax.transport.base import Tag

TARGETS: Final[dict[Literal["send", "recv"], str]] = {"send": "lamina_send", "recv": "lamina_recv"}
"""As `Channel.targets`."""

DEFAULT_SPIN_US: Final = 50.0
"""How long a wait polls before it sleeps."""

jax.ffi.register_ffi_target(TARGETS["send"], _custom_calls.send_handler(), platform="cpu")
jax.ffi.register_ffi_target(TARGETS["recv"], _custom_calls.recv_handler(), platform="cpu")
for _tag in Tag:
    _custom_calls.name_tag(int(_tag), _tag.label)
