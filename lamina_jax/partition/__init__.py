"""The converter: a function that calls `attend`, traced, cut into slices, or run whole."""

from lamina_jax.partition.cut import AttendSite, Partition, Ports, Slice, SliceProgram, cut, shape_of
from lamina_jax.partition.trace import Traced, trace, unsplit

__all__ = ["AttendSite", "Partition", "Ports", "Slice", "SliceProgram", "Traced", "cut", "shape_of", "trace", "unsplit"]
