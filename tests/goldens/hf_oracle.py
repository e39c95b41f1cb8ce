"""Runs a checkpoint with transformers on torch and writes what it computed. Started by `make_goldens.py`.

Needs nothing of lamina_jax, and another Python than it: one with torch.
"""

import argparse
import json
import platform

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]  (neither is installed here)

PROMPT_LENGTHS = (1, 2, 16, 17, 45, 129, 300)
NEW_TOKENS = 64


@torch.inference_mode()
def continuation(model, prompt):
    """Greedy tokens [NEW_TOKENS] that pay no heed to EOS, and the logits [NEW_TOKENS, vocab] each came from."""
    step = torch.from_numpy(prompt.astype(np.int64))[None]
    cache, tokens, logits = transformers.DynamicCache(config=model.config), [], []
    for _ in range(NEW_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True)
        logits.append(out.logits[0, -1].numpy())
        step = out.logits[:, -1:].argmax(-1)
        tokens.append(step.item())
    return np.array(tokens), np.stack(logits)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng = np.random.Generator(np.random.PCG64(0))
    arrays, gap = {}, float("inf")
    for length in PROMPT_LENGTHS:
        prompt = rng.integers(0, model.config.vocab_size, length)
        tokens, logits = continuation(model, prompt)
        top = np.sort(logits, axis=-1)
        gap = min(gap, float((top[:, -1] - top[:, -2]).min()))
        arrays[f"prompt_{length}"] = prompt.astype(np.int32)
        arrays[f"tokens_{length}"] = tokens.astype(np.int32)
        arrays[f"first_logits_{length}"] = logits[0]
        arrays[f"last_logits_{length}"] = logits[-1]
    np.savez_compressed(args.output, smallest_gap=np.float32(gap), **arrays)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"smallest_gap": gap, "python": platform.python_version(), **versions}))


if __name__ == "__main__":
    main()
