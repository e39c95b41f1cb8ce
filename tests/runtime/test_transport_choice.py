"""Which kind of channel joins the platforms, as asked for with `transport`."""

import pytest

from lamina_jax.engine.config import EngineConfig
from lamina_jax.runtime.places import channel_kind
from lamina_jax.transport import channel_kinds


@pytest.mark.parametrize(
    ("model", "attention", "transport", "kind"),
    [
        ("cpu", "cpu", "auto", "shm"),
        ("cuda", "cpu", "auto", "cuda_host"),
        ("cuda", "cuda", "auto", "cuda_ipc"),
        ("cpu", "cpu", "shm", "shm"),
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
