"""Makes a small Hugging Face checkpoint without a download, and trains it on the prose that ships with Python.

python scripts/make_tiny_checkpoint.py --output=checkpoints/tiny --train_seconds=60

The text is that of Python's help topics, its licence, and the docstrings of its standard library; a document is one
paragraph. A minute on two cores gives a model that writes English words and ends its paragraphs.
"""

import ast
import re
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from lamina_jax.models.atomic import new_directory
from lamina_jax.models.checkpoint import num_parameters
from lamina_jax.models.config import DTYPES, ModelConfig
from lamina_jax.models.llama import Llama
from lamina_jax.testing.tiny import write_checkpoint

_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the output directory if it exists.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the first weights and of the order of the text.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Dtype of the written weights; training is in float32.")
_TRAIN_SECONDS = flags.DEFINE_float("train_seconds", 0, "Train for this long.", lower_bound=0)
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 0, "Train for this many steps instead.", lower_bound=0)

SPECIAL_TOKENS = [BOS, EOS] = ["<|begin_of_text|>", "<|end_of_text|>"]
BATCH, TOKENS = 4, 128
PEAK_LEARNING_RATE = 4e-3


def documents() -> list[str]:
    """Paragraphs of English prose, without repetitions, in an order that depends on the Python version alone."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [topics[name] for name in sorted(topics)]
    texts += [path.read_text(encoding="utf-8") for path in library.glob("LICENSE*")]
    for path in sorted(library.glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        described = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, described)]
    paragraphs = (" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n"))
    return list(dict.fromkeys(paragraph for paragraph in paragraphs if _is_prose(paragraph)))


def _is_prose(paragraph: str) -> bool:
    letters = len(re.findall(r"[a-zA-Z ,.]", paragraph))
    whole = paragraph[:1].isupper() and paragraph.endswith(".")
    return whole and len(paragraph) >= 40 and letters > 0.9 * len(paragraph)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of 1024 tokens that puts BOS in front, as LLaMA 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


def model_config(tokenizer: Tokenizer, dtype: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        dtype=dtype,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_ids=(SPECIAL_TOKENS.index(EOS),),
    )


def token_stream(texts: list[str], tokenizer: Tokenizer, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    """All documents in random order, each between BOS and EOS; int32 [tokens].

    Each is cut at one random character before it is encoded, as prompts end anywhere: within a word, or after a space
    that would otherwise belong to the next token.
    """
    order = rng.permutation(len(texts))
    cuts = [int(rng.integers(len(texts[i]))) for i in order]
    heads = tokenizer.encode_batch([texts[i][:cut] for i, cut in zip(order, cuts, strict=True)])
    tails = tokenizer.encode_batch(
        [texts[i][cut:] for i, cut in zip(order, cuts, strict=True)], add_special_tokens=False
    )
    end = config.eos_token_ids[0]
    return np.concatenate([[*h.ids, *t.ids, end] for h, t in zip(heads, tails, strict=True)]).astype(np.int32)


def train(model: Llama, stream: np.ndarray, rng: np.random.Generator, *, seconds: float, steps: int) -> None:
    """Trains in place for `steps` steps, or for about `seconds` seconds if `steps` is 0; shows the loss."""
    graphdef, params = nnx.split(model)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, b2=0.98, weight_decay=0.0))
    state = optimizer.init(params)
    positions = jnp.broadcast_to(jnp.arange(TOKENS), (BATCH, TOKENS))

    def loss_of(params, text):
        trained = nnx.merge(graphdef, params)
        logits = trained.logits(trained.hidden_states(text[:, :-1], positions))
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    @jax.jit
    def step(params, state, text, learning_rate):
        loss, grads = jax.value_and_grad(loss_of)(params, text)
        updates, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda update: learning_rate * update, updates)
        return optax.apply_updates(params, updates), state, loss

    start, done = time.monotonic(), 0
    bar = tqdm(total=steps or None, desc="training", unit="step", mininterval=1)
    while (progress := done / steps if steps else (time.monotonic() - start) / seconds) < 1:
        offsets = rng.integers(0, len(stream) - TOKENS, BATCH)
        text = jnp.asarray(stream[offsets[:, None] + np.arange(TOKENS + 1)])
        # Linear warm-up over the first steps, then linear decay to zero at the end, be that a step or a moment.
        rate = PEAK_LEARNING_RATE * min(1.0, (done + 1) / 30) * (1 - progress)
        params, state, loss = step(params, state, text, jnp.float32(rate))
        done += 1
        bar.set_postfix(loss=f"{float(loss):.2f}", refresh=False)
        bar.update()
    bar.close()
    nnx.update(model, params)


def weights_of(model: Llama, dtype: str) -> dict[str, np.ndarray]:
    """The model's parameters as a Hugging Face checkpoint has them."""
    weights = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = np.asarray(parameter[...].astype(dtype))
        weights[model.checkpoint_name(path)] = np.ascontiguousarray(array.T) if path[-1] == "kernel" else array
    return weights


def main(argv):
    del argv
    try:
        with new_directory(_OUTPUT.value, overwrite=_OVERWRITE.value) as directory:
            texts = documents()
            tokenizer = train_tokenizer(texts)
            config = model_config(tokenizer, _DTYPE.value)
            model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(_SEED.value))
            if _TRAIN_SECONDS.value or _TRAIN_STEPS.value:
                rng = np.random.default_rng(_SEED.value)
                stream = token_stream(texts, tokenizer, config, rng)
                train(model, stream, rng, seconds=_TRAIN_SECONDS.value, steps=_TRAIN_STEPS.value)
            write_checkpoint(directory, config, weights_of(model, _DTYPE.value), tokenizer)
    except FileExistsError as error:
        raise SystemExit(f"make_tiny_checkpoint: {error} Or give --overwrite.") from None
    print(f"Wrote {_OUTPUT.value}: {num_parameters(config) / 1e6:.2f} M parameters, {config.vocab_size} tokens.")


if __name__ == "__main__":
    app.run(main)
