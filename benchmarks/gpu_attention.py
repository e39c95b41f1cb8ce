"""Decode attention over a paged KV cache on a GPU: bytes per second, over those of a plain copy on the same GPU.

    python benchmarks/gpu_attention.py [--batch=1,16,256] [--context=512,4096,65536] [--kernels=mosaic]
        [--kv_cache_dtype=auto,fp8,int8] [--json=FILE]

What is timed is `attend_cached` whole: the kernel and the merge of its splits. Its bytes are those of the keys and
values attended over as the cache holds them, scales included, each counted once. A run goes through as many layers as
are needed to leave no cache line of one run in the L2 cache for the next. The copy reads and writes an array of 4 GB;
it counts both.

Without a GPU, `--interpret --batch=1,2 --context=64,100` shows that the program works; its figures mean nothing.
"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path

from absl import app, flags

_BATCH = flags.DEFINE_list("batch", ["1", "4", "16", "64", "256"], "Sequences decoded together.")
_CONTEXT = flags.DEFINE_list("context", ["512", "1024", "4096", "16384", "65536"], "Tokens of each sequence.")
_HEADS = flags.DEFINE_integer("num_heads", 16, "Query heads; with the other defaults, a quarter of LLaMA-3-70B.")
_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 2, "KV heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Of the heads.")
_PAGE = flags.DEFINE_integer("page_size", 32, "Tokens in a page.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16"], "Of the model.")
_KV_CACHE_DTYPES = flags.DEFINE_list("kv_cache_dtype", ["auto"], "Of the cache: auto (as the model), fp8, int8.")
_KERNELS = flags.DEFINE_list("kernels", ["mosaic"], "Names in lamina_jax.attention.kernels.KERNELS.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 240.0, "Starts no further case after so long.", lower_bound=1.0)
_INTERPRET = flags.DEFINE_bool("interpret", False, "Interpret the mosaic kernel on a CPU.")
_JSON = flags.DEFINE_string("json", None, "Write the figures here as well.")

_L2_BYTES = 256 << 20
"""Beyond any L2 cache."""
_MOST_LAYERS = 64
_MEMORY_SHARE = 0.7
_COPY_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    kernel: str
    kv_cache_dtype: str
    batch: int
    context: int
    us: float
    gb_per_s: float
    of_copy: float
    """gb_per_s over that of the copy."""


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    import jax

    device = jax.local_devices()[0]
    if device.platform != "gpu" and not _INTERPRET.value:
        raise SystemExit(
            f"gpu_attention: JAX found no GPU (its devices are {device.platform}); install jax[cuda13], or use "
            "--interpret with a small --batch and --context."
        )
    copy = _copy_bandwidth((16 << 20) if _INTERPRET.value else _COPY_BYTES)
    deadline = time.monotonic() + _SECONDS.value
    rows, skipped = [], []
    shapes = itertools.product(map(int, _BATCH.value), map(int, _CONTEXT.value))
    for (batch, context), kernel, kv_cache_dtype in itertools.product(shapes, _KERNELS.value, _KV_CACHE_DTYPES.value):
        if _layer_bytes(kv_cache_dtype, batch, context) > _memory() or time.monotonic() > deadline:
            skipped.append(f"{kernel} {kv_cache_dtype} {batch} x {context}")
        else:
            rows.append(_measure(kernel, kv_cache_dtype, batch, context, copy))
    if _JSON.value:
        figures = {
            "device": device.device_kind,
            "copy_gb_per_s": copy / 1e9,
            "rows": list(map(dataclasses.asdict, rows)),
        }
        Path(_JSON.value).write_text(json.dumps(figures, indent=2) + "\n")
    _print(rows, skipped, device.device_kind, copy)


def _layer_bytes(kv_cache_dtype: str, batch: int, context: int) -> int:
    """Bytes of the keys and values that one layer attends over, and of their scales."""
    from lamina_jax.attention.quantization import scale_bytes, stored_dtype

    stored = stored_dtype(kv_cache_dtype, _DTYPE.value)
    return 2 * batch * context * _KV_HEADS.value * (_HEAD_DIM.value * stored.itemsize + scale_bytes(stored))


def _memory() -> float:
    """Bytes that the cache may take: a share of the device's."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return _MEMORY_SHARE * stats.get("bytes_limit", 4 << 30)


def _copy_bandwidth(nbytes: int) -> float:
    """Bytes per second, read and written, of a copy of so many bytes."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(nbytes // 4, jnp.int32)
    # A bare copy may be answered with the same buffer; an addition may not, and costs no more.
    add = jax.jit(lambda x: x + 1)
    return 2 * nbytes / _seconds(lambda: add(x))


def _seconds(run) -> float:
    """The median time of a run that returns arrays."""
    import jax

    jax.block_until_ready(run())
    times = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _measure(name: str, kv_cache_dtype: str, batch: int, context: int, copy: float) -> Row:
    import jax
    import jax.numpy as jnp

    layer_bytes = _layer_bytes(kv_cache_dtype, batch, context)
    # So many that a run reads more than the L2 cache holds, within the memory there is.
    layers = min(-(-_L2_BYTES // layer_bytes), _MOST_LAYERS, int(_memory() / layer_bytes))
    layers = 1 if _INTERPRET.value else layers
    kernel, inputs = _kernel(name), _inputs(kv_cache_dtype, batch, context, layers)

    @jax.jit
    def step(q, cache, tables, params):
        return [kernel.attend_cached(q, cache, jnp.int32(layer), tables, params) for layer in range(layers)]

    seconds = _seconds(lambda: step(*inputs)) / layers
    rate = layer_bytes / seconds
    return Row(name, kv_cache_dtype, batch, context, us=seconds * 1e6, gb_per_s=rate / 1e9, of_copy=rate / copy)


def _kernel(name: str):
    import jax

    from lamina_jax.attention.kernels import get_kernel
    from lamina_jax.attention.kernels.mosaic import MosaicKernel

    if name != "mosaic" or not _INTERPRET.value:
        return get_kernel(name, jax.local_devices()[0])
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

    return MosaicKernel(interpret=InterpretGPUParams())


def _inputs(kv_cache_dtype: str, batch: int, context: int, layers: int):
    """q, a cache of random numbers whose pages are dealt out at random, tables and parameters."""
    import jax
    import jax.numpy as jnp

    from lamina_jax.attention.cache import PagedCache, StepTables
    from lamina_jax.attention.params import AttendParams, LayerParams
    from lamina_jax.attention.quantization import is_quantized, quantize, stored_dtype

    width = -(-context // _PAGE.value)
    shape = (layers, batch * width, _KV_HEADS.value, _PAGE.value, _HEAD_DIM.value)
    keys = jax.random.split(jax.random.key(0), 4)
    stored = stored_dtype(kv_cache_dtype, _DTYPE.value)

    @jax.jit
    def draw(key):
        # One layer's worth of random numbers for all: their values do not matter, and making them takes memory.
        x = jax.random.normal(key, shape[1:], _DTYPE.value)
        numbers, scales = quantize(x, stored) if is_quantized(stored) else (x, None)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), (numbers, scales))

    q = jax.random.normal(keys[0], (batch, 1, _HEADS.value, _HEAD_DIM.value), _DTYPE.value)
    tables = StepTables(
        context_lens=jnp.full((batch,), context, jnp.int32),
        num_new=jnp.ones((batch,), jnp.int32),
        block_tables=jax.random.permutation(keys[3], batch * width).reshape(batch, width).astype(jnp.int32),
    )
    (k, of_k), (v, of_v) = draw(keys[1]), draw(keys[2])
    cache = PagedCache(k=k, v=v, scales=None if of_k is None else jnp.stack([of_k, of_v], axis=-2))
    return q, cache, tables, LayerParams.of(AttendParams(scale=_HEAD_DIM.value**-0.5))


def _print(rows: list[Row], skipped: list[str], device: str, copy: float) -> None:
    if skipped:
        print(f"skipped for memory or time: {', '.join(skipped)}")
    print(f"{device}, copy {copy / 1e9:.0f} GB/s, {_DTYPE.value}, {_HEADS.value}/{_KV_HEADS.value} heads of "
          f"{_HEAD_DIM.value}, pages of {_PAGE.value}")  # fmt: skip
    print("| kernel | cache | batch | context | us | GB/s | of copy |\n|---|---|---|---|---|---|---|")
    for row in rows:
        measured = f"{row.us:.1f} | {row.gb_per_s:.0f} | {row.of_copy:.0%}"
        print(f"| {row.kernel} | {row.kv_cache_dtype} | {row.batch} | {row.context} | {measured} |")


if __name__ == "__main__":
    app.run(main)
