"""What the set-up says when it cannot go on, and that it does nothing twice."""

import os
import shutil
import sys

import pytest

from lamina_jax.testing.rdma import packages
from lamina_jax.testing.rdma.image import made_once
from lamina_jax.testing.rdma.packages import SetupError, require_packages, run_tool

MISSING = ["no-such-package", "nor-this-one"]


def test_missing_packages_without_root(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(packages, "_installed", lambda name: name == "there")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    require_packages(["there"])
    with pytest.raises(
        SetupError,
        match=r"packages no-such-package, nor-this-one are needed; run as root: apt-get update && apt-get install "
        r"--yes --no-install-recommends no-such-package nor-this-one$",
    ):
        require_packages(["there", *MISSING])


def test_missing_packages_without_apt(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(SetupError, match="no-such-package, nor-this-one are needed, and this machine has no apt-get"):
        require_packages(MISSING)


def test_a_tool_that_is_missing_or_fails_is_named():
    with pytest.raises(SetupError, match=r"no-such-tool is needed, for: no-such-tool --now; it is not on the PATH"):
        run_tool(["no-such-tool", "--now"])
    with pytest.raises(SetupError, match=r"(?s)status 3 of: .*\nwhat is wrong$"):
        run_tool([sys.executable, "-c", "print('what is wrong'); raise SystemExit(3)"])


def test_made_once_and_again_for_other_inputs_or_after_a_failure(tmp_path):
    def make(inputs, *, fail=False) -> bool:
        with made_once(tmp_path / "made", inputs) as missing:
            if missing:
                assert not list((tmp_path / "made").iterdir())
                (tmp_path / "made/file").touch()
                if fail:
                    raise SetupError("no")
        return missing

    with pytest.raises(SetupError):
        make({"a": 1}, fail=True)
    assert [make({"a": 1}), make({"a": 1}), make({"a": 2}), make({"a": 1})] == [True, False, True, True]
