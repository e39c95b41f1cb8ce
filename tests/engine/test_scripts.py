"""The scripts as a user runs them, with an engine that answers at once in place of the real one."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
FAKE_ENGINE = """
import runpy, sys
import lamina_jax
from lamina_jax.engine.outputs import CompletionOutput, RequestOutput
from lamina_jax.engine.sampling_params import SamplingParams

class LLM:
    def __init__(self, model, **options):
        if model == "missing":
            raise FileNotFoundError("No config.json in missing")
        print("options", options, file=sys.stderr)
    def __enter__(self):
        return self
    def __exit__(self, *exc_info):
        print("closed", file=sys.stderr)
    def get_default_sampling_params(self):
        return SamplingParams(top_k=40)
    def validate(self, prompt, params):
        if prompt == "bad":
            raise ValueError("The prompt is bad.")
    def generate(self, prompts, params, *, use_tqdm=True):
        return [output for _, output in self.stream([(p, params) for p in prompts])]
    def stream(self, requests, *, use_tqdm=False):
        for i, (prompt, params) in enumerate(requests):
            if prompt == "interrupt":
                raise KeyboardInterrupt
            if prompt == "crash":
                raise ValueError("a bug in the engine")
            text = f"{prompt}: {params.top_k} {params.max_tokens} {params.stop}"
            completion = CompletionOutput(index=0, text=text, token_ids=[1], finish_reason="stop")
            yield i, RequestOutput(
                request_id=str(i), prompt=prompt, prompt_token_ids=[1, 2], outputs=[completion], finished=True
            )

lamina_jax.LLM, lamina_jax.SamplingParams = LLM, SamplingParams
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", FAKE_ENGINE, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=SCRIPTS.parent)


@pytest.mark.parametrize("script", ["generate.py", "batch_generate.py"])
def test_help_shows_the_usage_and_every_flag(script):
    command = [sys.executable, str(SCRIPTS / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert f"python scripts/{script} --model=DIR" in done.stdout
    for flag in ("model", "cluster", "max_tokens", "top_p", "num_attention_workers", "dtype", "page_size", "stop"):
        assert f"  --{flag}:" in done.stdout


def test_generate_prints_prompts_and_texts():
    done = run("generate.py", "--model=m", "--prompt=one", "--prompt=two", "--max_tokens=5", "--stop=a", "--stop=b,c")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("Prompt: one\nText: one: 40 5 ('a', 'b,c')\n\nPrompt: two\nText: two: 40 5 ('a', 'b,c')\n\n")
    assert "'num_attention_workers': 1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a"], "--model is required; see --help"),
        (["--model=m"], "--prompt is required; see --help"),
        (["--model=m", "--prompt=a", "b"], "unexpected argument 'b'; see --help"),
        (["--model=m", "--prompt=a", "--top_p=1.5"], "top_p must be in (0, 1], got 1.5."),
        (["--model=m", "--prompt=bad"], "The prompt is bad."),
        (["--model=missing", "--prompt=a"], "No config.json in missing"),
        (["--model=m", "--prompt=a", "--cluster=c.py"], "no cluster file at c.py; see configs/clusters/ for examples"),
        (["--check"], "--cluster is required; see --help"),
        (["--dtype=int8"], "flag --dtype=int8: value should be one of <auto|float32|bfloat16|float16>"),
        (["--promt=m"], "Unknown command line flag 'promt'. Did you mean: prompt ?"),
    ],
)
def test_generate_reports_mistakes_in_one_line(arguments, message):
    done = run("generate.py", *arguments)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("options", "closed"))]
    assert lines == [f"generate.py: error: {message}"]
    assert done.stdout == ""


def test_generate_gives_the_engine_its_cluster():
    done = run("generate.py", "--model=m", "--prompt=a", "--cluster=configs/clusters/loopback.py")
    assert done.returncode == 0, done.stderr
    assert "'cluster': Cluster(model_worker='tcp://127.0.0.1:7100'" in done.stderr
    alone = run("generate.py", "--model=m", "--prompt=a")
    assert "cluster" not in alone.stderr


def test_ctrl_c_is_quiet_and_closes_the_engine():
    done = run("generate.py", "--model=m", "--prompt=interrupt")
    assert done.returncode == 130
    assert "closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback():
    done = run("generate.py", "--model=m", "--prompt=crash")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_batch_generate_goes_on_past_bad_rows(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "bad"}\nnonsense\n{"prompt": "b", "max_tokens": 2}\n')
    arguments = ["--model=m", f"--input_file={source}", f"--output_file={target}", "--max_tokens=7"]
    done = run("batch_generate.py", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    texts = [row["outputs"][0]["text"] if row["outputs"] else row["error"]["line"] for row in rows]
    assert texts == ["a: 40 7 ()", 2, 3, "b: 40 2 ()"]
    assert "2 rows succeeded, 2 failed" in done.stderr

    again = run("batch_generate.py", *arguments)
    assert again.returncode == 2
    assert again.stderr == f"batch_generate.py: error: {target} exists; give --overwrite to replace it\n"
    source.write_text('{"prompt": "c"}\n')
    assert run("batch_generate.py", *arguments, "--overwrite").returncode == 0
    assert len(target.read_text().splitlines()) == 1


def test_batch_generate_checks_its_files_first(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    for source_flag, target, message in [
        (tmp_path / "none", tmp_path / "out", f"no input file at {tmp_path / 'none'}"),
        (source, tmp_path / "no" / "out", f"no directory {tmp_path / 'no'} to write the output file in"),
        (source, source, "the input file and the output file are the same"),
    ]:
        done = run(
            "batch_generate.py", "--model=m", f"--input_file={source_flag}", f"--output_file={target}", "--overwrite"
        )
        assert done.returncode == 2
        assert done.stderr == f"batch_generate.py: error: {message}\n"
    assert source.read_text() == '{"prompt": "a"}\n'


def test_an_interrupted_batch_keeps_what_was_done(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "interrupt"}\n')
    done = run("batch_generate.py", "--model=m", f"--input_file={source}", f"--output_file={target}")
    assert done.returncode == 130
    assert [json.loads(line)["prompt"] for line in target.read_text().splitlines()] == ["a"]
