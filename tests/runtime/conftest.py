"""A cluster key for tests."""

from pathlib import Path

import pytest

from lamina_jax.runtime.cluster_key import ClusterKey, load_key_file, make_key_file


@pytest.fixture
def key_file(tmp_path) -> Path:
    make_key_file(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


@pytest.fixture
def key(key_file) -> ClusterKey:
    return load_key_file(key_file)
