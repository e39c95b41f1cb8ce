"""The commands that a test finds in a document are those that a reader sees."""

import pathlib
import re
import subprocess

import pytest

from lamina_jax.testing.doc_commands import Commands, read_commands

DEPLOY = pathlib.Path(__file__).parents[2] / "docs" / "deploy.md"

DOCUMENT = """# Title
```bash host=a,b
one \\
  more
```
Text with `code`, and what something prints:
```
$ not a command
```
```bash host=b
two
```
"""


def test_blocks_have_hosts_and_scripts(tmp_path):
    (tmp_path / "d.md").write_text(DOCUMENT)
    assert read_commands(tmp_path / "d.md") == [
        Commands(hosts=("a", "b"), script="one \\\n  more\n", line=3),
        Commands(hosts=("b",), script="two\n", line=11),
    ]


@pytest.mark.parametrize("label", ["bash", "bash host=", "bash host=A", "bash hosts=a", "bash host=a, b"])
def test_commands_that_nobody_would_run_are_an_error(tmp_path, label):
    (tmp_path / "d.md").write_text(f"text\n```{label}\none\n```\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/d.md:2: expected ```bash host=a, b or a,b; got")):
        read_commands(tmp_path / "d.md")


def test_deploy_has_commands_for_both_hosts_that_bash_understands():
    found = read_commands(DEPLOY)
    assert {host for block in found for host in block.hosts} == {"a", "b"}
    assert DEPLOY.read_text().count("\n```bash") == len(found)
    for block in found:
        subprocess.run(["bash", "-n", "-c", block.script], check=True)
