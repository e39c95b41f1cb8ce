"""The model on one host, two attention workers on another; docs/deploy.md runs it."""

from ml_collections import ConfigDict

HOST_A, HOST_B = "10.99.0.1", "10.99.0.2"


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model_worker": f"tcp://{HOST_A}:7100",
            "attention_workers": [f"tcp://{HOST_B}:{port}" for port in (7101, 7102)],
            "transport": "auto",
            "key_file": "~/.config/lamina_jax/cluster.key",
        }
    )
