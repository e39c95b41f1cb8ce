"""Compiles all GPU programs of a deployment on a machine without a GPU, and says what became of them.

python scripts/aot_check.py --targets=h100,h20 --model=configs/models/llama3_70b.json --dop=2,4

Needs the environment that `make aot` makes. Ends with status 1 if the messages of a slice are not in their order, if a
kernel spills registers to memory, or if a worker does not fit the memory of its device.
"""

import dataclasses
import time
from collections.abc import Iterator

from absl import app, flags

from lamina_jax.aot.compiler import cuda_tools, prepare_environment
from lamina_jax.aot.fit import Fit, fit_attention_worker, fit_model_worker
from lamina_jax.aot.hlo import Hlo, early_violations, order_violations
from lamina_jax.aot.programs import (
    Deployment,
    SliceShapes,
    cache_shapes,
    compile_attention,
    compile_slice,
    in_flight_bytes,
    slice_shapes,
    slice_weight_bytes,
    weight_bytes,
    worker_config,
)
from lamina_jax.aot.report import FIT_HEADER, PROGRAM_HEADER, Entry, fit_row, problems, program_row, table
from lamina_jax.aot.targets import TARGETS, Target
from lamina_jax.attention.kernels import KERNELS, KernelTarget
from lamina_jax.attention.quantization import AUTO, STORED, check_kv_cache_dtype
from lamina_jax.models.config import ModelConfig

_TARGETS = flags.DEFINE_list("targets", sorted(TARGETS), f"GPUs to compile for, of {', '.join(sorted(TARGETS))}.")
_MODEL = flags.DEFINE_string("model", "configs/models/llama3_70b.json", "config.json of the model.")
_DOP = flags.DEFINE_list("dop", ["2", "4"], "Model devices, attention devices.")
_STEPS = flags.DEFINE_list("steps", ["256x1", "1x2048"], "Shapes of steps: sequences x new tokens of each.")
_CONTEXT = flags.DEFINE_integer("context", 4096, "Tokens that a sequence may have in the cache.", lower_bound=1)
_NUM_BATCHES = flags.DEFINE_integer("num_batches", 2, "Batches in flight.", lower_bound=1)
_CACHE_FRACTION = flags.DEFINE_float(
    "cache_fraction", 0.85, "Share of an attention device's memory that the KV cache takes.", 0.0, 1.0
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 32, "Tokens in a page of the cache.", lower_bound=1)
_KV_CACHE_DTYPES = flags.DEFINE_list(
    "kv_cache_dtypes", [AUTO, "int8", "fp8"], f"Of the KV cache, of {', '.join(STORED)}."
)
_KERNELS = flags.DEFINE_list("kernels", None, "Attention kernels; by default all that run on a GPU.")

_EARLY = (r" (?:cosine|sine)\(",)
"""The rotary angles depend on positions alone, so they need not wait for an answer."""


@dataclasses.dataclass
class Findings:
    """What has been compiled so far."""

    entries: list[Entry] = dataclasses.field(default_factory=list)
    fits: list[tuple[str, Fit]] = dataclasses.field(default_factory=list)
    disorder: list[str] = dataclasses.field(default_factory=list)


def main(argv):
    del argv
    start = time.monotonic()
    prepare_environment()
    findings = Findings()
    try:
        deployments = list(_deployments())
        targets = [_target(name) for name in _TARGETS.value]
        kernels = [pair for kind in _KV_CACHE_DTYPES.value for pair in _kernels(deployments[0], kind)]
    except (ValueError, OSError) as error:
        raise SystemExit(f"aot_check: {error}") from None
    weights = weight_bytes(deployments[0].local)
    for deployment in deployments:
        shapes = slice_shapes(deployment)
        for target in targets:
            _check_model(findings, deployment, shapes, weights, target)
            for kernel, kind in kernels:
                _check_attention(findings, dataclasses.replace(deployment, kv_cache_dtype=kind), kernel, target)
    print(table(PROGRAM_HEADER, [program_row(entry) for entry in findings.entries]))
    print()
    print(table(FIT_HEADER, [fit_row(fit, target) for target, fit in findings.fits]))
    failures = findings.disorder + problems(findings.entries, findings.fits)
    count = len(findings.entries)
    print(f"\n{count} programs compiled in {time.monotonic() - start:.0f} s, {len(failures)} problems")
    if failures:
        raise SystemExit("\n".join(["aot_check failed:", *failures]))


def gpu_kernels() -> list[str]:
    """Names of the attention kernels that run on a GPU; one that does not say where it runs is plain XLA."""
    return [name for name, kernel in KERNELS.items() if "cuda" in getattr(kernel, "platforms", ("cuda",))]


def _deployments() -> Iterator[Deployment]:
    config = ModelConfig.from_file(_MODEL.value)
    model_devices, attention_workers = map(int, _DOP.value)
    for step in _STEPS.value:
        batch, tokens = map(int, step.split("x"))
        deployment = Deployment(
            config=config,
            model_devices=model_devices,
            attention_workers=attention_workers,
            batch=batch,
            tokens=tokens,
            # A prompt runs by itself.
            num_batches=_NUM_BATCHES.value if tokens == 1 else 1,
            context=_CONTEXT.value,
            page_size=_PAGE_SIZE.value,
        )
        deployment.local  # noqa: B018 raises what is wrong with the numbers
        yield deployment


def _kernels(deployment: Deployment, kv_cache_dtype: str) -> list[tuple[str, str]]:
    """The kernels to compile for such a cache, each with its dtype."""
    config = deployment.config
    target = KernelTarget(
        platform="cuda",
        dtype=config.dtype,
        kv_cache_dtype=kv_cache_dtype,
        head_dim=config.head_dim,
        page_size=deployment.page_size,
    )
    check_kv_cache_dtype(kv_cache_dtype)
    if _KERNELS.value:
        return [(name, kv_cache_dtype) for name in _KERNELS.value]
    found = []
    for name in gpu_kernels():
        try:
            KERNELS[name].check(target)
        except ValueError as error:
            print(f"left out: {error}")
        else:
            found.append((name, kv_cache_dtype))
    return found


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; choose of {', '.join(sorted(TARGETS))}")
    return TARGETS[name]


def _check_model(findings: Findings, deployment: Deployment, shapes: SliceShapes, weights: int, target: Target) -> None:
    programs = []
    for name, k in shapes.distinct().items():
        compiled = compile_slice(deployment, shapes, k, target)
        title = f"{name} {deployment.batch}x{deployment.tokens}"
        findings.entries.append(Entry.of(title, target.name, compiled, cuda_tools() / "ptxas"))
        programs.append((compiled.memory, slice_weight_bytes(shapes, k)))
        hlo = Hlo.parse(compiled.hlo)
        violations = []
        if k < len(shapes.parts.slices) - 1:
            violations += order_violations(hlo, deployment.widths, receives=k > 0)
        if 0 < k < len(shapes.parts.slices) - 1:
            violations += early_violations(hlo, _EARLY)
        findings.disorder += [f"{title} on {target.name}: {violation}" for violation in violations]
    fit = fit_model_worker(
        weights=weights,
        programs=programs,
        in_flight=in_flight_bytes(deployment, shapes),
        capacity=target.memory_bytes,
    )
    findings.fits.append((f"{target.name} {_shape(deployment)}", fit))


def _check_attention(findings: Findings, deployment: Deployment, kernel: str, target: Target) -> None:
    config = worker_config(deployment, kernel=kernel, cache_bytes=int(_CACHE_FRACTION.value * target.memory_bytes))
    compiled = compile_attention(deployment, config, target)
    kind = kernel if deployment.kv_cache_dtype == AUTO else f"{kernel}, {deployment.kv_cache_dtype}"
    title = f"attention ({kind}) {_shape(deployment)}"
    findings.entries.append(Entry.of(title, target.name, compiled, cuda_tools() / "ptxas"))
    fit = fit_attention_worker(cache=cache_shapes(config).nbytes, memory=compiled.memory, capacity=target.memory_bytes)
    fit = dataclasses.replace(fit, worker=f"{fit.worker} ({kind})")
    findings.fits.append((f"{target.name} {_shape(deployment)}", fit))


def _shape(deployment: Deployment) -> str:
    times = f"{deployment.num_batches} x " if deployment.num_batches > 1 else ""
    return f"{times}{deployment.batch}x{deployment.tokens}"


if __name__ == "__main__":
    app.run(main)
