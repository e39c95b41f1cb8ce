import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina_jax.engine.batch_file import (
    BatchError,
    BatchRequest,
    OrderedWriter,
    error_row,
    parse_row,
    read_rows,
    result_row,
    run_batch,
)
from lamina_jax.engine.outputs import CompletionOutput, RequestOutput
from lamina_jax.engine.sampling_params import SamplingParams

DEFAULTS = SamplingParams(max_tokens=99, temperature=0.5)


def parse(row, line_number=1):
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(line, line_number, DEFAULTS)


def openai(**body):
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}


def output_for(prompt, number=0) -> RequestOutput:
    completion = CompletionOutput(index=0, text="yes", token_ids=(5, 6), finish_reason="stop", stop_reason="!")
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(
        request_id=str(number), prompt=text, prompt_token_ids=[1, 2, 3], outputs=[completion], finished=True
    )


class FakeLLM:
    """Runs `capacity` requests at a time and finishes the newest first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.most_ahead = 0

    def validate(self, prompt, params):
        if prompt == "too long":
            raise ValueError("The prompt has 9 tokens, the model takes 8.")

    def stream(self, requests, *, use_tqdm=False):
        running = []
        for number, (prompt, _) in enumerate(requests):
            running.append((number, output_for(prompt, number)))
            if len(running) == self.capacity:
                yield running.pop()
        yield from reversed(running)


def test_simple_row():
    row = parse({"prompt": "hi", "custom_id": "x", "max_tokens": 3, "stop": ["a"], "seed": 4, "top_k": None})
    params = SamplingParams(max_tokens=3, temperature=0.5, stop="a", seed=4)
    assert row == BatchRequest(line_number=1, prompt="hi", params=params, custom_id="x")


def test_simple_row_of_token_ids():
    row = parse({"prompt_token_ids": [1, 2]}, 7)
    assert row == BatchRequest(line_number=7, prompt={"prompt_token_ids": [1, 2]}, params=DEFAULTS)


def test_openai_row():
    body = {"model": "m", "user": "u", "stream": False, "best_of": 1, "logprobs": None, "logit_bias": {}, "top_p": 0.5}
    row = parse(openai(prompt="hi", **body))
    params = SamplingParams(max_tokens=99, temperature=0.5, top_p=0.5)
    assert row == BatchRequest(line_number=1, prompt="hi", params=params, custom_id="a", model="m", openai=True)
    tokens = parse(openai(prompt=[3, 4]))
    assert isinstance(tokens, BatchRequest)
    assert tokens.prompt == {"prompt_token_ids": [3, 4]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        ({}, "got neither"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "got both"),
        ({"prompt": ["a"]}, "prompt must be a string, got list"),
        ({"prompt_token_ids": []}, "not empty"),
        ({"prompt_token_ids": [True]}, "list of integers"),
        ({"prompt": "a", "custom_id": 5}, "custom_id must be a string"),
        ({"prompt": "a", "max_new_tokens": 5}, "Field 'max_new_tokens' is not supported"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"prompt": "a", "temperature": "1"}, "temperature must be a number"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature must be a finite number"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty is not supported, got 0.5"),
        ({"prompt": "a", "stream": True}, "stream is not supported, got True"),
        (openai(prompt="a", logprobs=3), "Field 'logprobs' is not supported"),
        (openai(prompt=["a", "b"]), "several prompts need several rows"),
        (openai(prompt=[1], prompt_token_ids=[2]), "cannot both be given"),
        (openai(), "got neither"),
        ({"url": "/v1/chat/completions", "body": {"messages": []}}, "/v1/chat/completions is not supported yet"),
        ({"url": "/v1/embeddings", "body": {}}, "url must be '/v1/completions', got '/v1/embeddings'"),
        ({"body": {"prompt": "a"}}, "url must be"),
        ({**openai(prompt="a"), "method": "GET"}, "method must be 'POST', got 'GET'"),
        ({**openai(), "body": "x"}, "body must be an object"),
    ],
)
def test_bad_rows_say_what_is_wrong(line, message):
    row = parse(line, 12)
    assert isinstance(row, BatchError)
    assert message in row.message
    assert row.line_number == 12
    error = error_row(row)["error"]
    assert (error["line"], error["message"]) == (12, row.message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["prompt", "prompt_token_ids", "custom_id", "url", "body", "n", "seed", "stop", "max_tokens"])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, JSON).map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20))
def test_no_line_raises(line):
    row = parse(line)
    assert isinstance(row, BatchRequest | BatchError)
    if isinstance(row, BatchError):
        OrderedWriter(io.BytesIO()).write(0, error_row(row))


def test_read_rows_skips_blank_lines_counts_them_and_is_lazy():
    def lines():
        yield b'\xef\xbb\xbf{"prompt": "a"}\r\n'
        yield b" \r\n"
        yield b"\n"
        yield b'{"prompt": "b"}'
        raise AssertionError("read ahead")

    rows = read_rows(lines(), DEFAULTS)
    found = [next(rows), next(rows)]
    assert [(r.prompt, r.line_number) for r in found] == [("a", 1), ("b", 4)]


def test_simple_result():
    row = parse({"prompt": "hi", "custom_id": "x"})
    assert isinstance(row, BatchRequest)
    assert result_row(row, output_for("hi"), "m") == {
        "custom_id": "x",
        "prompt": "hi",
        "outputs": [{"text": "yes", "token_ids": [5, 6], "finish_reason": "stop"}],
        "error": None,
    }


def test_openai_result():
    row = parse(openai(prompt="hi"))
    assert isinstance(row, BatchRequest)
    result = result_row(row, output_for("hi", 3), "dir/model")
    assert (result["custom_id"], result["error"]) == ("a", None)
    assert result["response"]["status_code"] == 200
    body = result["response"]["body"]
    assert (body["object"], body["model"], body["id"]) == ("text_completion", "dir/model", "cmpl-3")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    choice = {"index": 0, "text": "yes", "logprobs": None, "finish_reason": "stop", "stop_reason": "!"}
    assert body["choices"] == [choice]


def test_openai_error_has_its_shape():
    row = parse(openai(prompt="a", n=0))
    assert isinstance(row, BatchError)
    result = error_row(row)
    assert (result["custom_id"], result["response"]) == ("a", None)
    assert result["error"]["message"] == "n must be at least 1, got 0."


@given(st.permutations(range(8)))
def test_the_writer_restores_order_at_once(order):
    file = io.BytesIO()
    writer = OrderedWriter(file)
    done = set()
    for index in order:
        writer.write(index, {"i": index})
        done.add(index)
        ready = next(i for i in range(9) if i not in done)
        assert [json.loads(line)["i"] for line in file.getvalue().splitlines()] == list(range(ready))


def test_the_writer_refuses_an_index_twice():
    writer = OrderedWriter(io.BytesIO())
    for index in (0, 2):
        writer.write(index, {})
        with pytest.raises(ValueError, match=f"Result {index} was written before"):
            writer.write(index, {})


def test_the_writer_keeps_text_readable_and_flushes(tmp_path):
    path = tmp_path / "out.jsonl"
    with path.open("wb") as file:
        OrderedWriter(file).write(0, {"text": "洪\n\u2028\ud800"})
        line = path.read_bytes()
    assert "洪".encode() in line
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"text": "洪\n\u2028\ud800"}


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_run_batch(capacity):
    prompts = ["p0", "too long", "p2", "p3", "", "p5", "p6"]
    lines = [json.dumps({"prompt": p}).encode() + b"\n" for p in prompts]
    lines[4] = b"not json\n"
    lines.insert(2, b"\n")
    file = io.BytesIO()
    summary = run_batch(FakeLLM(capacity), lines, file, defaults=DEFAULTS, model="m")
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [row.get("prompt") for row in rows] == ["p0", "too long", "p2", "p3", None, "p5", "p6"]
    errors = {row["error"]["line"]: row["error"]["message"] for row in rows if row["error"]}
    assert errors.keys() == {2, 6}
    assert errors[2] == "The prompt has 9 tokens, the model takes 8."
    assert (summary.succeeded, summary.failed) == (5, 2)
    assert (summary.prompt_tokens, summary.generated_tokens) == (15, 10)


def test_run_batch_reads_no_further_than_the_engine_asks():
    written_when_read = []
    file = io.BytesIO()

    def lines():
        for i in range(20):
            written_when_read.append(file.getvalue().count(b"\n"))
            yield b'{"prompt": "%d"}\n' % i

    run_batch(FakeLLM(1), lines(), file, defaults=DEFAULTS, model="m")
    assert written_when_read == list(range(20))
