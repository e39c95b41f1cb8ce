"""The converter: a function that calls `attend`, traced, cut into slices, or run whole."""

from lamina_jax.partition.cut import AttendSite, Partition, Slice, SliceProgram, cut
from lamina_jax.partition.trace import Traced, trace, unsplit

__all__ = ["AttendSite", "Partition", "Slice", "SliceProgram", "Traced", "cut", "trace", "unsplit"]
