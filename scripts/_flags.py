"""Flags and error reports that the generating scripts and the launch scripts share."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags

from lamina_jax.runtime.cluster import Cluster, load_cluster
from lamina_jax.runtime.errors import WorkerError

if TYPE_CHECKING:
    from lamina_jax.runtime.checks import Check

# JAX would look for others, and say so. `run` changes it for --model_platform=cuda and --platform=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The flags below then count as the calling script's own, which is what makes --help show them.
flags.disclaim_key_flags()

FLAGS = flags.FLAGS
_SAMPLING_FLAGS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "stop")
_ENGINE_FLAGS = (
    "num_attention_workers",
    "model_platform",
    "attention_platform",
    "transport",
    "tensor_parallel_size",
    "model_memory_fraction",
    "attention_memory_fraction",
    "dtype",
    "max_model_len",
    "page_size",
    "max_num_seqs",
    "max_prefill_tokens",
    "num_batches",
    "min_batch_seqs",
    "overlap",
    "kv_cache_bytes",
    "kv_cache_dtype",
    "timeout_s",
    "start_timeout_s",
    "seed",
    "trace_dir",
)


class UserError(Exception):
    """Something for the user to put right; reported as one line, without a traceback."""


def define_engine_flags() -> None:
    """Defines --model and how and where it is run."""
    flags.DEFINE_string("model", None, "Directory of the model: config.json, safetensors, tokenizer.json (required).")
    define_cluster_flags("an engine of the cluster")
    flags.DEFINE_integer(
        "num_attention_workers",
        1,
        "Processes that hold the KV cache and compute attention; 0 runs the model whole in this process.",
        lower_bound=0,
    )
    flags.DEFINE_enum("model_platform", "cpu", ["cpu", "cuda"], "Where everything but attention runs.")
    flags.DEFINE_enum("attention_platform", "cpu", ["cpu", "cuda"], "Where attention runs.")
    flags.DEFINE_string(
        "transport",
        "auto",
        "Kind of channel to the attention workers: auto, or one that suits the platforms (gda between GPUs is RDMA).",
    )
    flags.DEFINE_integer(
        "tensor_parallel_size",
        1,
        "Devices that share the model; num_attention_workers is a multiple of it.",
        lower_bound=1,
    )
    for whose in ("model", "attention"):
        flags.DEFINE_float(
            f"{whose}_memory_fraction",
            None,
            f"Of a GPU's memory, what {'the model' if whose == 'model' else 'each attention worker'} may take; if not "
            "given, 0.9 of it, divided by the workers that share the GPU.",
            lower_bound=0.0,
            upper_bound=1.0,
        )
    flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "auto takes the checkpoint's own.")
    flags.DEFINE_integer(
        "max_model_len",
        None,
        "Most tokens of a sequence, its prompt included; the model's own limit if not given.",
        lower_bound=1,
    )
    flags.DEFINE_integer("page_size", 16, "Tokens in a page of the KV cache.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 64, "Most sequences decoded at a time.", lower_bound=1)
    flags.DEFINE_integer("max_prefill_tokens", 512, "Most prompt tokens in a step of a batch.", lower_bound=1)
    flags.DEFINE_integer(
        "num_batches",
        2,
        "Most batches in flight: one's slices run while another's attention does; 1 is off.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "min_batch_seqs",
        None,
        "Sequences that each batch must get before there is another one, as every batch reads all weights; if not "
        "given, 32 on a CPU and 8 on a GPU, or fewer if max_num_seqs is too small for num_batches of them.",
        lower_bound=1,
    )
    flags.DEFINE_bool("overlap", True, "Start attention over the cache while k and v are still being computed.")
    flags.DEFINE_integer(
        "kv_cache_bytes",
        None,
        "Memory for the KV cache; if not given, a quarter of what is free at most.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "kv_cache_dtype",
        "auto",
        ["auto", "fp8", "fp8_e4m3", "int8"],
        "Of the KV cache; auto is that of the model, the others take one byte per number and a scale per vector.",
    )
    flags.DEFINE_float("timeout_s", 60.0, "Longest wait of one device for another, in seconds.")
    flags.DEFINE_float("start_timeout_s", 120.0, "Longest wait for the workers of a cluster to be there, in seconds.")
    flags.DEFINE_integer("seed", 0, "Fixes the random choices of the whole run.", lower_bound=0)
    flags.DEFINE_string(
        "trace_dir", None, "Write a timeline there, trace.json, for Perfetto or scripts/plot_timeline.py."
    )


def define_sampling_flags() -> None:
    """Defines the sampling parameters; those not given come from the model's generation_config.json."""
    flags.DEFINE_integer("max_tokens", None, "Most tokens to generate for a prompt; 16 if nothing else says.")
    flags.DEFINE_float("temperature", None, "0 takes the most probable token each time.")
    flags.DEFINE_integer("top_k", None, "Choose among the k most probable tokens; 0 is all.")
    flags.DEFINE_float("top_p", None, "Choose among the most probable tokens that together reach this; 1 is all.")
    flags.DEFINE_float("min_p", None, "Drop tokens less probable than this times the most probable; 0 drops none.")
    flags.DEFINE_multi_string("stop", None, "String that ends the text, itself left out")


def define_cluster_flags(whose: str) -> None:
    """Defines --cluster and --check.

    Args:
        whose: what --check looks at, e.g. "this worker".
    """
    flags.DEFINE_string("cluster", None, "Cluster file: which workers there are, and where; see docs/deploy.md.")
    flags.DEFINE_bool(
        "check", False, f"Only check what {whose} needs, print a table and end, with status 1 if it lacks any."
    )


def read_cluster() -> Cluster:
    """The cluster that --cluster names."""
    require("cluster")
    with user_errors():
        return load_cluster(FLAGS.cluster)


def report(checks: Sequence["Check"]) -> NoReturn:
    """Prints the table of --check and ends."""
    # Imported late, as are checks.
    from lamina_jax.runtime.checks import table

    failed = sum(check.result == "FAILED" for check in checks)
    print(f"{table(checks)}\n{len(checks)} checks, {failed} failed")
    sys.exit(1 if failed else 0)


def check_engine() -> None:
    """Reports and ends if --check was given."""
    if not FLAGS.check:
        return
    cluster = read_cluster()
    from lamina_jax.runtime.checks import engine_checks

    report(engine_checks(cluster))


def engine_options() -> dict[str, Any]:
    """Keyword arguments of `LLM`, its model excepted."""
    cluster = {"cluster": read_cluster()} if FLAGS.cluster else {}
    return {**cluster, **{name: FLAGS[name].value for name in _ENGINE_FLAGS}}


def sampling_options() -> dict[str, Any]:
    """The `SamplingParams` that were given as flags."""
    return {name: FLAGS[name].value for name in _SAMPLING_FLAGS if FLAGS[name].value is not None}


def require(*names: str) -> None:
    """Raises `UserError` for a flag that was not given."""
    for name in names:
        if not FLAGS[name].value:
            raise UserError(f"--{name} is required; see --help")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around calls whose ValueError or OSError means that the user gave something unusable."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(error) from error


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs the script: exit status 2 for a user's error, 1 for a worker's, 130 for Ctrl-C."""

    def guarded(arguments: Sequence[str]) -> None:
        try:
            if len(arguments) > 1:
                raise UserError(f"unexpected argument {arguments[1]!r}; see --help")
            _choose_platforms()
            main()
        except UserError as error:
            _fail(error)
        except WorkerError as error:
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
            sys.exit(1)

    try:
        app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt:
        sys.exit(130)


def _choose_platforms() -> None:
    if _platform() == "cuda":
        # Imported late: it reads the variable above as it is imported.
        import jax

        jax.config.update("jax_platforms", "cuda,cpu")


def _platform() -> str:
    """Where this process runs programs. That of a cluster's engine runs none."""
    if "platform" in FLAGS:
        return FLAGS.platform
    if "model_platform" in FLAGS and not FLAGS["cluster"].value:
        return FLAGS.model_platform
    return "cpu"


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        return FLAGS(arguments)
    except flags.Error as error:
        _fail(error)
    except SystemExit:
        # absl prints the help within the parse, and then exits as if that were an error.
        sys.exit(0)


def _fail(error: Exception) -> NoReturn:
    print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
    sys.exit(2)
