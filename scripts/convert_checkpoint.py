"""Converts a Hugging Face checkpoint to one that is restored straight to devices, each reading only its part.

python scripts/convert_checkpoint.py --model=HF_DIR --output=DIR
"""

from pathlib import Path

from absl import app, flags

from lamina_jax.models import load_model
from lamina_jax.models.checkpoint import num_parameters
from lamina_jax.models.orbax_store import save_orbax

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory to read.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must be empty or not exist.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "Cast weights to this dtype.")

_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main(argv):
    del argv
    try:
        config, model = load_model(_MODEL.value, dtype=_DTYPE.value)
        source = Path(_MODEL.value)
        save_orbax(_OUTPUT.value, config, model, files=[source / name for name in _COPIED if (source / name).exists()])
    except (ValueError, OSError) as error:
        # What users get wrong is told without a traceback.
        raise SystemExit(f"convert_checkpoint: {error}") from None
    print(f"Wrote {_OUTPUT.value}: {num_parameters(config) / 1e6:.1f} M parameters.")


if __name__ == "__main__":
    app.run(main)
