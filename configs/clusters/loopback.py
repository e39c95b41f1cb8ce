"""All workers on one host, for trying: no key, no network."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model_worker": "tcp://127.0.0.1:7100",
            "attention_workers": ["tcp://127.0.0.1:7101", "tcp://127.0.0.1:7102"],
        }
    )
