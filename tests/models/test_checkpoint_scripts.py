"""make_tiny_checkpoint.py and convert_checkpoint.py, run as users run them."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from tokenizers import Tokenizer

from lamina_jax.models import load_generation_config, load_model
from lamina_jax.models.checkpoint import num_parameters

SCRIPTS = Path(__file__).parents[2] / "scripts"


def _run(name, *args):
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    result = _run("make_tiny_checkpoint", f"--output={directory}", "--train_steps=3", "--dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    return directory


def test_made_checkpoint_is_whole(trained):
    config, model = load_model(trained)
    assert config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    assert 1e6 < num_parameters(config) < 2e6
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    ids = tokenizer.encode("The naïve\tfunction ").ids
    assert ids[0] == config.bos_token_id
    assert max(ids) < config.vocab_size
    assert tokenizer.decode(ids) == "The naïve\tfunction "
    assert load_generation_config(trained).eos_token_ids == (tokenizer.token_to_id("<|end_of_text|>"),)


def test_same_seed_and_steps_make_the_same_checkpoint(trained, tmp_path):
    _run("make_tiny_checkpoint", f"--output={tmp_path / 'again'}", "--train_steps=3", "--dtype=bfloat16")
    for file in trained.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_scripts_overwrite_nothing(trained, tmp_path):
    (tmp_path / "mine").touch()
    for result in (
        _run("make_tiny_checkpoint", f"--output={tmp_path}"),
        _run("convert_checkpoint", f"--model={trained}", f"--output={tmp_path}"),
    ):
        assert result.returncode == 1
        assert "expected nothing or an empty directory" in result.stderr
        assert "Traceback" not in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_converted_checkpoint_is_whole(trained, tmp_path):
    result = _run("convert_checkpoint", f"--model={trained}", f"--output={tmp_path / 'converted'}")
    assert result.returncode == 0, result.stderr
    names = {file.name for file in (tmp_path / "converted").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "orbax"}
    assert load_model(tmp_path / "converted")[0] == load_model(trained)[0]


def test_what_cannot_be_converted_is_told_without_a_traceback(tmp_path):
    result = _run("convert_checkpoint", f"--model={tmp_path}", f"--output={tmp_path / 'converted'}")
    assert result.returncode == 1
    assert "config.json: no such file" in result.stderr
    assert "Traceback" not in result.stderr
