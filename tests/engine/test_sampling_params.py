import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from lamina_jax.engine.sampling_params import SamplingParams, ValidationError


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.seed, params.stop, params.stop_token_ids, params.max_tokens) == (None, (), (), 16)
    assert not params.ignore_eos
    assert not params.include_stop_str_in_output
    assert params.skip_special_tokens
    assert not params.greedy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens must be at least 1, got 0."),
        ("top_p", 1.5, "top_p must be in (0, 1], got 1.5."),
        ("top_p", 0, "top_p must be in (0, 1], got 0.0."),
        ("temperature", -1.0, "temperature must be in [0, 2], got -1.0."),
        ("temperature", 2.1, "temperature must be in [0, 2], got 2.1."),
        ("temperature", float("nan"), "temperature must be a finite number, got nan."),
        ("temperature", 10**400, None),
        ("temperature", "1", "temperature must be a number, got '1'."),
        ("temperature", True, "temperature must be a number, got True."),
        ("min_p", 1.01, "min_p must be in [0, 1], got 1.01."),
        ("top_k", -2, "top_k must be 0 or -1 (off), or at least 1, got -2."),
        ("top_k", 2.0, "top_k must be an integer, got 2.0."),
        ("n", 0, "n must be at least 1, got 0."),
        ("n", True, "n must be an integer, got True."),
        ("n", None, "n must be an integer, got None."),
        ("seed", 2**63, None),
        ("seed", "7", "seed must be an integer, got '7'."),
        ("stop", "", "stop must not contain an empty string, got ('',)."),
        ("stop", ["a", ""], "stop must not contain an empty string, got ('a', '')."),
        ("stop", ["a", 1], "stop must be a string or a sequence of strings, got ['a', 1]."),
        ("stop", 3, "stop must be a string or a sequence of strings, got 3."),
        ("stop_token_ids", "12", "stop_token_ids must be a sequence of token ids, got '12'."),
        ("stop_token_ids", [1, "2"], "stop_token_ids must be an integer, got '2'."),
        ("stop_token_ids", [-1], "stop_token_ids must not contain negative ids, got (-1,)."),
        ("ignore_eos", 1, "ignore_eos must be True or False, got 1."),
        ("skip_special_tokens", None, "skip_special_tokens must be True or False, got None."),
    ],
)
def test_bad_values_are_refused_by_name(name, value, message):
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name
    assert message is None or str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_greedy_with_several_completions_is_refused():
    with pytest.raises(ValidationError, match=r"^n must be 1 when using greedy sampling, got 2\.$"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(n=2, temperature=1e-5).n == 2


def test_greedy_below_the_threshold():
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_values_are_stored_as_plain_python():
    given: dict[str, Any] = {
        "n": np.int32(2),
        "temperature": np.float32(0.5),
        "top_k": np.int64(-1),
        "seed": np.uint32(7),
        "stop": ["a", "b"],
        "stop_token_ids": np.array([1, 2]),
        "ignore_eos": np.bool_(True),
        "max_tokens": None,
    }
    params = SamplingParams(**given)
    values = (params.n, params.temperature, params.top_k, params.seed, params.ignore_eos, params.max_tokens)
    assert values == (2, 0.5, -1, 7, True, None)
    assert [type(v) for v in values] == [int, float, int, int, bool, type(None)]
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (1, 2)
    assert all(type(t) is int for t in params.stop_token_ids)
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # pyright: ignore[reportArgumentType]


def test_frozen_hashable_and_replaceable():
    params = SamplingParams(stop="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(params) == hash(SamplingParams(stop=["x"]))
    assert dataclasses.replace(params, top_k=4).stop == ("x",)
    with pytest.raises(ValidationError):
        dataclasses.replace(params, top_k=-5)


def test_the_error_survives_pickle_and_copy():
    with pytest.raises(ValidationError) as caught:
        SamplingParams(n=0)
    for error in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert (str(error), error.parameter, error.value) == (str(caught.value), "n", 0)
