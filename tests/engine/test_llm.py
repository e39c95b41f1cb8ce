"""LLM.generate as a user meets it: inputs, ends, order, errors."""

import itertools
import shutil

import pytest
import tokenizers
import tokenizers.processors

from lamina_jax import LLM, SamplingParams
from lamina_jax.models import CheckpointError
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.testing import write_tiny_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa", num_shards=2)
    return directory


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(model=checkpoint, num_attention_workers=2, dtype="auto") as llm:
        yield llm


def generate(llm: LLM, prompts, params: SamplingParams | list[SamplingParams] = GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def test_outputs_come_in_input_order_with_all_fields(llm):
    outputs = generate(llm, ["Hello", "The capital of", {"prompt_token_ids": [72, 105]}, {"prompt": "Hi"}])
    assert [o.prompt for o in outputs] == ["Hello", "The capital of", None, "Hi"]
    assert list(outputs[0].prompt_token_ids) == list(b"Hello") or len(outputs[0].prompt_token_ids) > 0
    # The same prompt as text and as ids.
    assert outputs[2].prompt_token_ids == outputs[3].prompt_token_ids
    assert outputs[2].outputs == outputs[3].outputs
    for output in outputs:
        (completion,) = output.outputs
        assert output.finished
        assert len(completion.token_ids) == 12
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        metrics = output.metrics
        assert metrics is not None
        assert metrics.num_generated_tokens == 12
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_one_prompt_alone(llm):
    assert len(generate(llm, "Hello")) == 1
    assert generate(llm, []) == []


def test_params_for_each_prompt(llm):
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (3, 1, 7)]
    outputs = generate(llm, ["a", "b", "c"], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 1, 7]


def test_eos_ends_without_a_stop_reason(llm, checkpoint):
    (plain,) = generate(llm, "Hello")
    eos = plain.outputs[0].token_ids[4]
    directory = checkpoint.parent / "other_eos"
    shutil.copytree(checkpoint, directory)
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": [{eos}]}}')
    with LLM(directory, num_attention_workers=0) as other:
        (ended,) = generate(other, "Hello", SamplingParams(temperature=0.0, max_tokens=12))
        (ignored,) = generate(other, "Hello", GREEDY)
    length = plain.outputs[0].token_ids.index(eos) + 1
    assert ended.outputs[0].token_ids == plain.outputs[0].token_ids[:length]
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    assert ignored.outputs == plain.outputs


def test_stop_token_and_stop_string(llm):
    (plain,) = generate(llm, "Hello")
    token = plain.outputs[0].token_ids[3]
    stop_token = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[token])
    (by_token,) = generate(llm, "Hello", stop_token)
    assert (by_token.outputs[0].finish_reason, by_token.outputs[0].stop_reason) == ("stop", token)
    assert len(by_token.outputs[0].token_ids) == plain.outputs[0].token_ids.index(token) + 1

    text = plain.outputs[0].text
    stop = text[2:4]
    stop_string = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=stop)
    (by_string,) = generate(llm, "Hello", stop_string)
    assert by_string.outputs[0].text == text[: text.index(stop)]
    assert (by_string.outputs[0].finish_reason, by_string.outputs[0].stop_reason) == ("stop", stop)


def test_max_model_len_ends_a_sequence(checkpoint):
    with LLM(checkpoint, num_attention_workers=1, max_model_len=20) as llm:
        unlimited = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        (output,) = generate(llm, {"prompt_token_ids": list(range(1, 15))}, unlimited)
        assert len(output.outputs[0].token_ids) == 6
        assert output.outputs[0].finish_reason == "length"


def test_seed_fixes_the_text_whatever_the_neighbours(llm):
    seeded = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=7, max_tokens=20, ignore_eos=True)
    other = SamplingParams(temperature=1.5, min_p=0.01, max_tokens=20, ignore_eos=True)
    (alone,) = generate(llm, "Hello", seeded)
    crowd = generate(llm, ["x", "Hello", "yy", "Hello"], [other, seeded, GREEDY, seeded])
    assert crowd[1].outputs[0].token_ids == crowd[3].outputs[0].token_ids == alone.outputs[0].token_ids
    reseeded = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=8, max_tokens=20, ignore_eos=True)
    assert generate(llm, "Hello", reseeded)[0].outputs[0].token_ids != alone.outputs[0].token_ids


def test_n_completions_differ_and_the_first_is_that_of_n_1(llm):
    three = SamplingParams(n=3, seed=5, max_tokens=16, ignore_eos=True)
    one = SamplingParams(n=1, seed=5, max_tokens=16, ignore_eos=True)
    (output,) = generate(llm, "Hello", three)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({c.token_ids for c in output.outputs}) == 3
    assert generate(llm, "Hello", one)[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_same_program_gives_the_same_samples(checkpoint):
    texts = []
    for _ in range(2):
        with LLM(checkpoint, num_attention_workers=0, seed=3) as llm:
            texts.append([o.outputs[0].token_ids for o in generate(llm, ["a", "a"], SamplingParams(max_tokens=8))])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_stream_takes_requests_as_there_is_room(checkpoint):
    taken = itertools.count()
    with LLM(checkpoint, num_attention_workers=1, max_num_seqs=2) as llm:
        requests = ((f"prompt {next(taken)}", GREEDY) for _ in range(50))
        outputs = llm.stream(requests)
        index, output = next(outputs)
        assert index in (0, 1)
        assert output.prompt == f"prompt {index}"
        assert next(taken) < 8
        outputs.close()


def test_prompts_of_unequal_length_run_in_one_step(checkpoint):
    with LLM(checkpoint, num_attention_workers=1) as llm:
        buckets = []
        assert isinstance(llm._worker, ModelWorker)
        run = llm._worker.run_with_logits
        llm._worker.run_with_logits = lambda plans: [buckets.extend(p.bucket for p in plans), run(plans)][1]
        generate(llm, [{"prompt_token_ids": [7] * n} for n in (3, 40, 17, 64)])
    assert (buckets[0].batch, buckets[0].tokens) == (4, 64)


def test_empty_text_is_refused_though_the_tokenizer_would_add_a_token(checkpoint, tmp_path):
    directory = tmp_path / "bos"
    shutil.copytree(checkpoint, directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="A $A", special_tokens=[("A", 65)])
    tokenizer.save(str(directory / "tokenizer.json"))
    with LLM(directory, num_attention_workers=0) as llm:
        assert list(generate(llm, "x")[0].prompt_token_ids) == [65, 120]
        with pytest.raises(ValueError, match="empty"):
            generate(llm, "")


PROMPTS = {
    "empty text": ("", ValueError, "empty"),
    "empty ids": ({"prompt_token_ids": []}, ValueError, "empty"),
    "too long": ({"prompt_token_ids": [1] * 512}, ValueError, "512 tokens, but max_model_len is 512"),
    "id too large": ({"prompt_token_ids": [1, 260]}, ValueError, "Token id 260 is out of range.* 260 tokens"),
    "negative id": ({"prompt_token_ids": [-1]}, ValueError, "Token id -1 is out of range"),
    "id of a wrong type": ({"prompt_token_ids": [1.5]}, ValueError, "must be integers, got 1.5"),
    "ids of a wrong type": ({"prompt_token_ids": 5}, ValueError, "prompt_token_ids must be a list of integers, got 5"),
    "no prompt": ({"text": "x"}, ValueError, "A prompt must be"),
    "text of a wrong type": ({"prompt": 3}, ValueError, "A prompt must be"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_prompt_is_refused_before_anything_runs(llm, name):
    prompt, error, message = PROMPTS[name]
    with pytest.raises(error, match=message):
        generate(llm, ["good", prompt])
    with pytest.raises(error, match=message):
        llm.validate(prompt, GREEDY)
    assert len(generate(llm, "good")) == 1


def test_bad_parameters_are_refused(llm):
    with pytest.raises(ValueError, match=r"max_tokens must be at least 1, got -1\."):
        SamplingParams(max_tokens=-1)
    with pytest.raises(ValueError, match=r"n must be at most 1024, got 3000000\."):
        SamplingParams(n=3_000_000)
    with pytest.raises(ValueError, match="2 prompts but 3 sampling_params"):
        generate(llm, ["a", "b"], [GREEDY] * 3)


SETTINGS = {
    "more workers than KV heads": ({"num_attention_workers": 4}, ValueError, "4, but the model has only 3 KV heads"),
    "negative workers": ({"num_attention_workers": -1}, ValueError, "num_attention_workers .*at least 0, got -1"),
    "too long a model": ({"max_model_len": 513}, ValueError, "513, but .*512"),
    "no page": ({"page_size": 0}, ValueError, "page_size must be an integer of at least 1, got 0"),
    "cache too small": ({"max_model_len": 512, "kv_cache_bytes": 1000}, ValueError, "Lower max_model_len or raise"),
    "unknown dtype": ({"dtype": "int7"}, ValueError, "int7"),
    "unknown dtype of the cache": (
        {"kv_cache_dtype": "fp4"},
        ValueError,
        "one of auto, fp8, fp8_e4m3, int8, got 'fp4'",
    ),
    "unknown kernel": ({"attention_kernel": "x"}, ValueError, "attention kernel 'x'"),
    "kernel of a GPU": ({"attention_kernel": "mosaic"}, ValueError, "runs on cuda, but .* on cpu; use .*'auto'"),
    "negative seed": ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
    "no time": ({"timeout_s": 0.0}, ValueError, "timeout_s must be a positive number of seconds, got 0"),
    "too many batches": ({"num_batches": 9}, ValueError, "need 8 cpu devices.* JAX_NUM_CPU_DEVICES=8"),
    "unknown setting": ({"pipeline_parallel_size": 2}, TypeError, "no setting pipeline_parallel_size"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_setting_is_refused(checkpoint, name):
    settings, error, message = SETTINGS[name]
    with pytest.raises(error, match=message):
        LLM(checkpoint, **settings)


def test_directory_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(tmp_path, num_attention_workers=1)
    with pytest.raises(CheckpointError, match="no/such/model"):
        LLM("no/such/model", num_attention_workers=1)


def test_truncated_shard(checkpoint, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(checkpoint, directory)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        LLM(directory, num_attention_workers=1)


def test_no_tokenizer(checkpoint, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(checkpoint, directory)
    (directory / "tokenizer.json").unlink()
    with LLM(directory, num_attention_workers=0) as llm:
        (output,) = generate(llm, {"prompt_token_ids": [72]})
        assert output.outputs[0].text == ""
        with pytest.raises(ValueError, match="no tokenizer"):
            generate(llm, "text")
        with pytest.raises(ValueError, match="Stop strings need text"):
            generate(llm, {"prompt_token_ids": [72]}, SamplingParams(stop="x"))


def test_closed_llm_says_so(checkpoint):
    llm = LLM(checkpoint, num_attention_workers=1)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="cannot be used any more: it was closed"):
        generate(llm, "a")


def test_bar_shows_token_rates(llm, capfd):
    llm.generate(["a", "b"], GREEDY)
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert "prompt" in shown
    assert "decode" in shown
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_second_ctrl_c_closes_the_llm(checkpoint, monkeypatch):
    """The first one waits for the steps under way; a second one while it does must leave nothing half open."""

    def interrupted(self, timeout_s):
        raise KeyboardInterrupt

    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM(checkpoint, num_attention_workers=1) as llm:
        outputs = llm.stream(({"prompt_token_ids": [5, 6]}, params) for _ in range(100))
        next(outputs)
        monkeypatch.setattr("lamina_jax.engine.llm._Run.drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            outputs.close()
        with pytest.raises(RuntimeError, match="cannot be used any more: a step did not end after it was interrupted"):
            llm.generate({"prompt_token_ids": [5]}, params)
