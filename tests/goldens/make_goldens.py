"""Writes tests/goldens/*.npz: what transformers on torch makes of the tiny checkpoints. Run by a person, seldom.

    python3.11 -m venv /tmp/oracle && /tmp/oracle/bin/pip install torch transformers numpy
    python tests/goldens/make_goldens.py --oracle_python=/tmp/oracle/bin/python

For each config of `lamina_jax.testing.TINY_CONFIGS`, or those that --names gives, and each prompt length n: prompt_n,
tokens_n (64 greedy tokens, EOS disregarded), first_logits_n and last_logits_n (those that the first and the last of
these came from, float32).
Tests compare tokens exactly, so no step may be a near-tie; where one is, give the config another seed in TINY_SEEDS.
"""

import datetime
import json
import subprocess
import tempfile
from pathlib import Path

from absl import app, flags, logging

from lamina_jax.testing.tiny import TINY_CONFIGS, TINY_SEEDS, write_tiny_checkpoint

_ORACLE_PYTHON = flags.DEFINE_string("oracle_python", None, "A Python that has torch and transformers.", required=True)

_NAMES = flags.DEFINE_list("names", list(TINY_CONFIGS), "The configs to do, with commas between.")

_HERE = Path(__file__).parent
SMALLEST_GAP = 2e-3
"""Of the two highest logits of any step; implementations differ by 1e-4 at most."""


def _run_oracle(name: str) -> dict[str, str | float]:
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_checkpoint(directory, name)
        output = Path(directory) / "golden.npz"
        command = [_ORACLE_PYTHON.value, _HERE / "hf_oracle.py", f"--model={directory}", f"--output={output}"]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        gap = report.pop("smallest_gap")
        logging.info("%s: seed %d, smallest gap %.2g", name, TINY_SEEDS[name], gap)
        if gap < SMALLEST_GAP:
            raise app.UsageError(f"{name}: smallest gap {gap:.2g} < {SMALLEST_GAP}: change its seed in TINY_SEEDS.")
        (_HERE / f"{name}.npz").write_bytes(output.read_bytes())
        return report


def main(argv):
    del argv
    reports = [_run_oracle(name) for name in _NAMES.value]
    versions = {**reports[-1], "date": datetime.date.today().isoformat()}
    (_HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
