"""XLA's GPU compiler without a GPU.

Needs the wheels of `constraints-aot.txt`: the CUDA plugin of JAX, and ptxas. `prepare_environment` has to run before
JAX is imported.
"""

import atexit
import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from lamina_jax import _custom_calls
from lamina_jax.aot.targets import Target
from lamina_jax.runtime.gpu_options import GPU_COMPILER_OPTIONS

MODEL_AXIS = "model"
"""Mesh axis of the devices that share the model."""

_MOSAIC_DUMP = "MOSAIC_GPU_DUMP_TO"
_mosaic_seen: dict[frozenset[str], tuple[str, ...]] = {}

_HANDLERS = ("lamina_cuda_send", "lamina_cuda_recv", "lamina_fence")

_OPTIONS = {
    # Autotuning measures on a device.
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    # Writes the assembly of every kernel.
    "xla_dump_emitter_re": ".*",
    **GPU_COMPILER_OPTIONS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a program takes on each device.

    Attributes:
        arguments: weights and inputs.
        outputs: results, those in memory of arguments included.
        aliased: results in memory of arguments.
        temporaries: everything between.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program compiled for a target.

    Attributes:
        hlo: the scheduled module.
        thunks: XLA's list of what is launched, command buffers (CUDA graphs) and what they record indented below.
        ptx: assembly of the kernels that XLA and Mosaic made; cuBLAS's are in its library.
        memory: what the program takes on each device.
    """

    hlo: str
    thunks: str
    ptx: tuple[str, ...]
    memory: Memory


@functools.cache
def mesh(target: Target, num_devices: int) -> Mesh:
    """A mesh of devices that exist only for the compiler, along MODEL_AXIS.

    Raises:
        RuntimeError: JAX has no CUDA plugin here.
    """
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        raise RuntimeError("expected the CUDA plugin of JAX; run `make aot`, which makes an environment that has it")
    _register_handlers()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.config, topology=f"1x1x{num_devices}")
    return topologies.make_mesh(topology, (num_devices,), (MODEL_AXIS,))


def compile_for_gpu(function: Callable, arguments: Sequence[Any], **jit_options: Any) -> Compiled:
    """Compiles `function` for the devices in its arguments' shardings.

    Args:
        function: to be jitted.
        arguments: pytrees of `jax.ShapeDtypeStruct` with shardings over a `mesh`.
        **jit_options: of `jax.jit`, e.g. `donate_argnums`.
    """
    lowered = jax.jit(function, **jit_options).trace(*arguments).lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory() as directory:
        compiled = lowered.compile(compiler_options={**_OPTIONS, "xla_dump_to": directory})
        dumped = Path(directory)
        hlo, stats = compiled.as_text(), compiled.memory_analysis()
        if hlo is None or stats is None:
            raise RuntimeError("expected the compiler to give the scheduled program and its memory, got none")
        return Compiled(
            hlo=hlo,
            thunks=_thunks(dumped),
            ptx=(*(path.read_text() for path in sorted(dumped.glob("*.ptx"))), *_mosaic_ptx(hlo)),
            memory=Memory(
                arguments=stats.argument_size_in_bytes,
                outputs=stats.output_size_in_bytes,
                aliased=stats.alias_size_in_bytes,
                temporaries=stats.temp_size_in_bytes,
            ),
        )


def prepare_environment() -> None:
    """Lets JAX's CUDA plugin load without a driver, and find ptxas. To be called before JAX makes a backend."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["PATH"] += f":{cuda_tools()}"
    # Pallas' Mosaic kernels are compiled outside XLA, and dumped by a switch of their own.
    directory = tempfile.mkdtemp(prefix="lamina-aot-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ[_MOSAIC_DUMP] = directory


def cuda_tools() -> Path:
    """Where the wheel with ptxas put it. Raises RuntimeError if it is not installed."""
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        if (tools := Path(root) / "cu13" / "bin").is_dir():
            return tools
    raise RuntimeError("expected the wheel nvidia-cuda-nvcc; run `make aot`, which makes an environment that has it")


@functools.cache
def _register_handlers() -> None:
    for name in _HANDLERS:
        jax.ffi.register_ffi_target(name, _custom_calls.compile_only_handler(), platform="CUDA")


def _mosaic_ptx(hlo: str) -> tuple[str, ...]:
    """Assembly of a program's Mosaic kernels.

    They are compiled once per process and dumped then, wherever the first of them was: a program whose kernels are all
    known has those of the program before.
    """
    kernels = frozenset(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', hlo))
    if kernels and kernels not in _mosaic_seen:
        directory = Path(os.environ[_MOSAIC_DUMP])
        found = sorted(directory.glob("*.ptx"))
        if not found:
            raise RuntimeError("expected Mosaic to dump the assembly of its kernels; call prepare_environment first")
        _mosaic_seen[kernels] = tuple(path.read_text() for path in found)
        for path in found:
            path.unlink()
    return _mosaic_seen.get(kernels, ())


def _thunks(dumped: Path) -> str:
    """The thunks of a program, as they are after the passes over them; XLA writes that only if a pass did something."""
    for pattern in ("*.thunk_sequence_after_thunk_passes.txt", "*.thunk_sequence.txt"):
        found = list(dumped.glob(pattern))
        if len(found) == 1:
            return found[0].read_text()
    raise RuntimeError(
        f"expected the compiler to dump one thunk sequence, got {sorted(p.name for p in dumped.iterdir())}"
    )
