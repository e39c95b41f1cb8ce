"""Compiling the GPU's programs on a machine that has no GPU, and reading off what XLA made of them.

It is a package of the product, beside `lamina_jax.testing`, and not a directory of its own, because tests import it.
Nothing but `scripts/aot_check.py` and tests depends on it. Only `compiler` needs the wheels of `.venv-aot`.
"""
