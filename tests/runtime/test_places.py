"""Which GPU each worker gets, and how much of its memory."""

import pytest

from lamina_jax.runtime.places import attention_environments, attention_gpus, channel_kind, model_memory_fraction


@pytest.mark.parametrize(
    ("num_workers", "num_model_gpus", "num_gpus", "expected"),
    [
        (4, 2, 6, [2, 3, 4, 5]),
        (4, 2, 4, [2, 3, 2, 3]),
        (1, 1, 1, [0]),
        (3, 2, 2, [0, 1, 0]),
        (0, 1, 1, []),
    ],
)
def test_workers_take_the_gpus_behind_the_models(num_workers, num_model_gpus, num_gpus, expected):
    assert attention_gpus(num_workers, num_model_gpus=num_model_gpus, num_gpus=num_gpus) == expected


@pytest.mark.parametrize(
    ("num_workers", "num_model_gpus", "num_gpus", "model", "attention"),
    [
        (4, 2, 6, 0.9, [0.9] * 4),
        (4, 2, 4, 0.9, [0.45] * 4),
        (1, 1, 1, 0.45, [0.45]),
        # GPU 0 has the model and two workers, GPU 1 the model and one.
        (3, 2, 2, 0.3, [0.3, 0.45, 0.3]),
        (0, 1, 1, 0.9, []),
    ],
)
def test_workers_of_a_gpu_share_its_memory(monkeypatch, num_workers, num_model_gpus, num_gpus, model, attention):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    sizes = {"num_workers": num_workers, "num_model_gpus": num_model_gpus, "num_gpus": num_gpus}
    assert model_memory_fraction(**sizes) == pytest.approx(model)
    environments = attention_environments("cuda", **sizes, memory_fraction=None)
    assert [float(e["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for e in environments] == pytest.approx(attention)


def test_a_fraction_that_was_asked_for_is_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    sizes = {"num_workers": 2, "num_model_gpus": 1, "num_gpus": 3}
    environments = attention_environments("cuda", **sizes, memory_fraction=0.25)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["GPU-b", "GPU-c"]
    assert {e["XLA_PYTHON_CLIENT_MEM_FRACTION"] for e in environments} == {"0.250"}
    assert {e["JAX_PLATFORMS"] for e in environments} == {"cuda,cpu"}


def test_workers_on_cpus_see_no_gpu():
    environments = attention_environments("cpu", num_workers=2, num_model_gpus=1, num_gpus=1, memory_fraction=0.5)
    assert environments == [{"JAX_PLATFORMS": "cpu"}] * 2


def test_attention_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="no GPU; use attention_platform='cpu'"):
        attention_environments("cuda", num_workers=1, num_model_gpus=0, num_gpus=0, memory_fraction=None)


def test_channels_by_platforms():
    kinds = {(m, a): channel_kind(m, a) for m, a in [("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda")]}
    assert kinds == {("cpu", "cpu"): "shm", ("cuda", "cpu"): "cuda_host", ("cuda", "cuda"): "cuda_ipc"}
