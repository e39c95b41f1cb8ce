"""Loading checkpoint directories: what comes out, what is refused and how, and how much memory it takes."""

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lamina_jax.models import CheckpointError, load_generation_config, load_model
from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.models.orbax_store import save_orbax
from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint
from lamina_jax.testing.tiny import tiny_weights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _parameters(model):
    return {path: parameter[...] for path, parameter in nnx.to_flat_state(nnx.state(model))}


def _assert_holds(model, weights, dtype):
    """The model's parameters are `weights`, which are named and shaped as in a Hugging Face checkpoint."""
    for path, array in _parameters(model).items():
        expected = weights[model.checkpoint_name(path)].astype(dtype)
        np.testing.assert_array_equal(array, expected.T if path[-1] == "kernel" else expected)
        assert array.dtype == dtype


def _edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.fixture
def single(tmp_path):
    write_tiny_checkpoint(tmp_path, "gqa")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    write_tiny_checkpoint(tmp_path, "gqa", num_shards=3)
    return tmp_path


@pytest.mark.parametrize("name", ["gqa", "tied", "bias"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_arrives_in_its_place(tmp_path, name, num_shards):
    write_tiny_checkpoint(tmp_path, name, seed=5, num_shards=num_shards)
    config, model = load_model(tmp_path)
    assert config == TINY_CONFIGS[name]
    _assert_holds(model, tiny_weights(config, seed=5), jnp.float32)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16", "float16"])
def test_weights_are_cast_to_the_dtype_asked_for(tmp_path, stored, wanted):
    config = write_tiny_checkpoint(tmp_path, "gqa", seed=0, dtype=stored)
    _, model = load_model(tmp_path, dtype=wanted)
    _assert_holds(model, tiny_weights(config, seed=0), jnp.dtype(stored if wanted == "auto" else wanted))


def test_placement_puts_parameters_on_a_device(single):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, model = load_model(single, placement=lambda path, shape: sharding)
    assert all(array.committed and array.sharding == sharding for array in _parameters(model).values())


def test_same_arguments_write_the_same_bytes(tmp_path):
    for name in "ab":
        write_tiny_checkpoint(tmp_path / name, "gqa", seed=3, num_shards=2)
    files = {name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab"}
    assert files["a"] == files["b"]


def test_tensors_of_no_use_to_the_model_may_be_there(tmp_path):
    write_tiny_checkpoint(tmp_path, "tied")

    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    _edit_weights(tmp_path / "model.safetensors", add)
    load_model(tmp_path)


def _remove_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()


def _truncate_shard(directory):
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _garble_shard(directory):
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 64)


def _empty_shard(directory):
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"")


def _index(**changes):
    return lambda directory: _edit_json(directory / "model.safetensors.index.json", **changes)


def _index_is(text):
    return lambda directory: (directory / "model.safetensors.index.json").write_text(text)


def _index_sends_elsewhere(directory):
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    here, others = weight_map[Q_PROJ], set(weight_map.values())
    _edit_json(index, weight_map=weight_map | {Q_PROJ: min(others - {here})})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_shard, r"model-00002-of-00003\.safetensors: no such file.*Download"),
        (_truncate_shard, r"model-00002-of-00003\.safetensors: expected a whole safetensors file.*Download it again"),
        (_garble_shard, r"model-00002-of-00003\.safetensors: expected a whole safetensors file"),
        (_empty_shard, r"model-00002-of-00003\.safetensors: expected a whole safetensors file"),
        (_index_is("{"), r"index\.json: expected JSON, got .*Download"),
        (_index_is("[]"), r"index\.json: expected a JSON object, got list"),
        (_index_is("{}"), r"index\.json: field 'weight_map': expected an object .*got nothing"),
        (_index(weight_map={}), r"'weight_map': expected an object .*got \{\}"),
        (_index(weight_map={"a": 1}), r"'weight_map\.a': expected the name of a file beside the index, got 1"),
        (
            _index(weight_map={"a": "../b"}),
            r"'weight_map\.a': expected the name of a file beside the index, got '../b'",
        ),
        (
            _index_sends_elsewhere,
            rf"safetensors: expected tensor '{Q_PROJ}', as .*index\.json says, got no such tensor",
        ),
    ],
)
def test_bad_shards_and_indices_are_named(sharded, damage, message):
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        load_model(sharded)


def _weights(change):
    return lambda directory: _edit_weights(directory / "model.safetensors", change)


def _config(**changes):
    return lambda directory: _edit_json(directory / "config.json", **changes)


def _pickles_only(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_weights(lambda w: w.pop(Q_PROJ)), rf"expected tensor '{Q_PROJ}' \(48, 48\).*got no such tensor.*Check"),
        (_weights(lambda w: w.pop("lm_head.weight")), r"expected tensor 'lm_head.weight' \(260, 48\)"),
        (
            _weights(lambda w: w.update({Q_PROJ: w[Q_PROJ][:-8].copy()})),
            rf"model\.safetensors: tensor '{Q_PROJ}': expected shape \(48, 48\), as config\.json says, got \(40, 48\)",
        ),
        (
            _weights(lambda w: w.update({Q_PROJ: w[Q_PROJ].astype(np.int8)})),
            rf"tensor '{Q_PROJ}': expected dtype F32, BF16, F16, got I8.*Quantized",
        ),
        (
            _weights(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32)})),
            r"1 tensors have no place in LlamaForCausalLM.*'model\.layers\.0\.self_attn\.q_proj\.bias'.*attention_bias",
        ),
        (_config(num_hidden_layers=1), r"9 tensors have no place.*num_hidden_layers"),
        (_config(num_hidden_layers=3), r"expected tensor 'model\.layers\.2\."),
        (_config(intermediate_size=95), r"expected shape \((95, 48|48, 95)\)"),
        (_config(architectures=["GPT2LMHeadModel"]), r"config\.json: field 'architectures'.*LlamaForCausalLM"),
        (lambda d: (d / "config.json").unlink(), r"config\.json: no such file"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), r"config\.json: expected JSON"),
        (lambda d: (d / "model.safetensors").unlink(), r"expected model\.safetensors or .*index\.json, got neither\.$"),
        (_pickles_only, r"got neither\. It holds PyTorch files: save them as safetensors"),
    ],
)
def test_bad_directories_are_named(single, damage, message):
    damage(single)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(single)
    assert str(single) in str(error.value)


def test_what_is_no_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint directory, got nothing"):
        load_model(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="expected a checkpoint directory, got a file"):
        load_model(tmp_path / "file")


def test_unknown_dtype_is_refused(single):
    with pytest.raises(ValueError, match="dtype: expected 'auto' or one of float32, bfloat16, float16, got 'int8'"):
        load_model(single, dtype="int8")


# Prints by how many bytes the resident memory grew at its highest while the checkpoint was loaded, and the final
# weights' bytes. The kernel's own high-water mark of RSS is reset first, and counts mapped pages of files too.
MEASURE = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from lamina_jax.models import load_model

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

load_model(sys.argv[1])  # Compiles what is compiled, and imports what is imported late.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
_, model = load_model(sys.argv[2])
leaves = jax.tree.leaves(nnx.state(model))
print(status("VmHWM") - before, sum(leaf.nbytes for leaf in leaves))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    config = dataclasses.replace(
        TINY_CONFIGS["gqa"],
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=6,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=20000,
    )
    write_tiny_checkpoint(tmp_path / "small", "gqa")
    # One file, of which all pages would stay resident if it were kept open.
    write_tiny_checkpoint(tmp_path / "large", config, dtype="bfloat16")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown, weights = map(int, output.split())
    print(f"grew by {grown / weights:.2f} x the weights")
    assert weights > 200e6
    assert grown < 1.3 * weights


def test_generation_config(single):
    assert load_generation_config(single).eos_token_ids == (257,)
    path = single / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [1]}))
    defaults = load_generation_config(single)
    assert dataclasses.astuple(defaults) == ((1,), True, 0.6, 0.9, 50)


def test_eos_comes_from_the_config_where_the_generation_config_has_none(single):
    (single / "generation_config.json").write_text("{}")
    assert load_generation_config(single).eos_token_ids == (257,)
    (single / "generation_config.json").unlink()
    assert load_generation_config(single).eos_token_ids == (257,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("3", "expected a JSON object, got int"),
        ('{"temperature": "hot"}', "field 'temperature': expected a number, got 'hot'"),
        ('{"temperature": -1}', "field 'temperature': expected a number between 0.0 and inf, got -1"),
        ('{"top_p": 1.5}', "field 'top_p': expected a number between 0.0 and 1.0, got 1.5"),
        ('{"top_k": 0.5}', "field 'top_k': expected a non-negative integer, got 0.5"),
        ('{"do_sample": "yes"}', "field 'do_sample': expected true or false, got 'yes'"),
        ('{"eos_token_id": "</s>"}', "field 'eos_token_id': expected a token id or a list of token ids, got '</s>'"),
    ],
)
def test_malformed_generation_config_is_refused(single, text, message):
    (single / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        load_generation_config(single)


@pytest.fixture
def orbax(single, tmp_path_factory):
    """A converted checkpoint, and the model that was converted."""
    config, model = load_model(single)
    directory = tmp_path_factory.mktemp("converted") / "model"
    save_orbax(directory, config, model, files=[single / "tokenizer.json"])
    return directory, config, model


def test_orbax_restores_what_was_saved(orbax):
    directory, config, model = orbax
    restored_config, restored = load_model(directory)
    assert restored_config == config
    assert (directory / "tokenizer.json").exists()
    for path, array in _parameters(restored).items():
        np.testing.assert_array_equal(array, _parameters(model)[path])


def test_orbax_restores_in_another_dtype_and_placed(orbax):
    directory, _, model = orbax
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, restored = load_model(directory, dtype="bfloat16", placement=sharding)
    for path, array in _parameters(restored).items():
        np.testing.assert_array_equal(array, _parameters(model)[path].astype(jnp.bfloat16))
        assert array.sharding == sharding


def test_saved_config_names_the_dtype_of_the_model(single, tmp_path_factory):
    config, model = load_model(single, dtype="bfloat16")
    directory = tmp_path_factory.mktemp("converted") / "model"
    save_orbax(directory, config, model)
    assert load_model(directory)[0].dtype == "bfloat16"


def test_orbax_overwrites_nothing(orbax):
    directory, config, model = orbax
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(FileExistsError, match="expected nothing or an empty directory"):
        save_orbax(directory, config, model)
    assert sorted(directory.parent.rglob("*")) == before


def test_orbax_leaves_nothing_where_it_fails(tmp_path, single):
    config, model = load_model(single)
    with pytest.raises(FileNotFoundError):
        save_orbax(tmp_path / "out" / "model", config, model, files=[tmp_path / "missing"])
    assert list((tmp_path / "out").iterdir()) == []


# Orbax leaves coroutines of what failed to the garbage collector, which cannot close them any more and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_orbax_folders_are_refused(orbax):
    directory, _, _ = orbax
    _edit_json(directory / "config.json", intermediate_size=97)
    with pytest.raises(CheckpointError, match=r"orbax: parameter 'layers\.0\.mlp\.down_proj\.kernel'.*\(97, 48\)"):
        load_model(directory)
    _edit_json(directory / "config.json", intermediate_size=96)
    (directory / "orbax" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"orbax: cannot be restored: .*Convert the checkpoint again"):
        load_model(directory)
    gc.collect()


def test_an_abstract_model_allocates_nothing():
    huge = dataclasses.replace(TINY_CONFIGS["gqa"], hidden_size=1 << 20, vocab_size=1 << 20)
    _, state = abstract_model(huge, dtype="bfloat16")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
