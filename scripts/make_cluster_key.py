"""Makes the key that the engine and the workers of a cluster share.

python scripts/make_cluster_key.py --output=cluster.key

Copy the file to every host, and keep it private: whoever has it may use the workers.
"""

import sys

from absl import app, flags

from lamina_jax.runtime.cluster_key import DEFAULT_PATH, make_key_file

_OUTPUT = flags.DEFINE_string("output", str(DEFAULT_PATH), "File to write; it must not exist.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        make_key_file(_OUTPUT.value)
    except OSError as error:
        sys.exit(f"make_cluster_key: {error}")
    print(f"Made {_OUTPUT.value}. Copy it to every host, e.g. with scp -p, and keep it private.")


if __name__ == "__main__":
    app.run(main)
