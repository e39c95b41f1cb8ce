"""Which kind of channel joins the platforms, as asked for with `transport`."""

import pytest

from lamina_jax.engine.config import EngineConfig
from lamina_jax.runtime.places import channel_kind, cluster_channel_kind
from lamina_jax.transport import channel_kinds


@pytest.mark.parametrize(
    ("model", "attention", "transport", "kind"),
    [
        ("cpu", "cpu", "auto", "shm"),
        ("cuda", "cpu", "auto", "cuda_host"),
        ("cuda", "cuda", "auto", "cuda_ipc"),
        ("cpu", "cpu", "shm", "shm"),
        ("cpu", "cpu", "verbs", "verbs"),
        ("cpu", "cpu", "tcp", "tcp"),
        ("cuda", "cuda", "gda", "gda"),
    ],
)
def test_kind(model, attention, transport, kind):
    assert channel_kind(model, attention, transport) == kind
    assert kind in channel_kinds()


@pytest.mark.parametrize(
    ("platforms", "transport", "suitable"),
    [
        (("cpu", "cpu"), "gda", "auto, shm"),
        (("cuda", "cpu"), "shm", "auto, cuda_host"),
        (("cuda", "cuda"), "pigeon", "auto, cuda_ipc, gda"),
    ],
)
def test_unsuitable_transport_lists_the_suitable(platforms, transport, suitable):
    model, attention = platforms
    message = (
        f"transport '{transport}' does not lead from a model on {model} .* on {attention}; those that do: {suitable}."
    )
    with pytest.raises(ValueError, match=message):
        EngineConfig(model_platform=model, attention_platform=attention, transport=transport)


BOTH = ("mlx5_0", "rxe0")


@pytest.mark.parametrize(
    ("transport", "same_host", "rdma", "kind", "why"),
    [
        ("auto", True, BOTH, "shm", "as both are on one host"),
        ("auto", False, BOTH, "verbs", "as both have an RDMA device (mlx5_0 / rxe0)"),
        ("auto", False, ("mlx5_0", None), "tcp", "as the attention worker has no RDMA device (no uverbs)"),
        ("auto", False, (None, "rxe0"), "tcp", "as the model worker has no RDMA device (no pyverbs)"),
        ("verbs", True, BOTH, "verbs", "as the cluster asks for"),
        ("tcp", True, (None, None), "tcp", "as the cluster asks for"),
        ("shm", True, (None, None), "shm", "as the cluster asks for"),
    ],
)
def test_kind_in_a_cluster(transport, same_host, rdma, kind, why):
    problems = ("no pyverbs", "no uverbs")
    chosen = cluster_channel_kind("cpu", "cpu", transport, same_host=same_host, rdma=rdma, rdma_problems=problems)
    assert chosen == (kind, why)


@pytest.mark.parametrize(
    ("transport", "rdma", "message"),
    [
        ("shm", BOTH, "'shm' joins workers that share memory, and these are on different hosts"),
        ("verbs", ("mlx5_0", None), "'verbs' needs .*, but the attention worker has no RDMA device \\(no uverbs\\)"),
        ("verbs", (None, None), "the model worker has no .* \\(no pyverbs\\) and the attention worker has no .*"),
        ("pigeon", BOTH, "transport 'pigeon' does not lead"),
    ],
)
def test_kind_that_a_cluster_does_not_have(transport, rdma, message):
    problems = ("no pyverbs", "no uverbs")
    with pytest.raises(ValueError, match=message):
        cluster_channel_kind("cpu", "cpu", transport, same_host=False, rdma=rdma, rdma_problems=problems)


def test_gpus_of_a_cluster():
    settings = {"transport": "auto", "rdma": BOTH}
    assert cluster_channel_kind("cuda", "cpu", same_host=True, **settings)[0] == "cuda_host"
    with pytest.raises(ValueError, match="a model on cuda and attention on cpu must be on one host"):
        cluster_channel_kind("cuda", "cpu", same_host=False, **settings)
