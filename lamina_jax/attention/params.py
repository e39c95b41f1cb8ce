"""What an attend is told besides q, k and v: as Python values of a model, and as arrays of a device's program."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

NO_WINDOW = np.iinfo(np.int32).max
"""A window that no two positions are far enough apart to leave."""
_NO_CAP = math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendParams:
    """The parameters of one attend. Raises ValueError where a window or cap is not positive."""

    scale: float
    """Factor on the scores."""
    window: int | None = None
    """How many tokens a token sees, itself included; None is all."""
    soft_cap: float | None = None
    """Scores become ``soft_cap * tanh(scores / soft_cap)``, before the mask; None leaves them as they are."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, the token itself; got {self.window}.")
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise ValueError(f"soft_cap must be positive and finite; got {self.soft_cap}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerParams:
    """`AttendParams` as arrays: of one layer (scalars), or of many ([layers], to scan over)."""

    # JAX makes objects of this class from shapes and placeholders too, which a type checker would refuse.
    __no_type_check__ = True

    scale: Float32[Array, "*layers"]
    window: Int32[Array, "*layers"]
    """NO_WINDOW where a layer has none."""
    soft_cap: Float32[Array, "*layers"] | None
    """Infinite where a layer has none; None if no layer has one, so that kernels need not compute it."""

    @classmethod
    def of(cls, params: AttendParams) -> "LayerParams":
        """One layer's."""
        return jax.tree.map(lambda x: x[0], cls.stack([params]))

    @classmethod
    def stack(cls, params: Sequence[AttendParams]) -> "LayerParams":
        """Those of several layers, in order."""
        caps = [_NO_CAP if p.soft_cap is None else p.soft_cap for p in params]
        return cls(
            scale=jnp.asarray([p.scale for p in params], jnp.float32),
            # A window longer than an int32 counts is none.
            window=jnp.asarray([min(p.window or NO_WINDOW, NO_WINDOW) for p in params], jnp.int32),
            soft_cap=None if all(map(math.isinf, caps)) else jnp.asarray(caps, jnp.float32),
        )
