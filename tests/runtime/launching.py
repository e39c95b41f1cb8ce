"""How tests start the launch scripts."""

import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLUSTER_FILE = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({fields!r})\n"


def command(script: str, *flags: str) -> list[str]:
    """Runs a script."""
    return [sys.executable, str(ROOT / "scripts" / script), *flags]


def cluster_file(path: Path, *, key_file: str | None = None, transport: str = "auto") -> tuple[str, str]:
    """Writes a cluster on free ports of loopback; returns the addresses of its model worker and attention worker."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        model, attention = (f"tcp://127.0.0.1:{s.getsockname()[1]}" for s in (one, two))
    fields = {"model_worker": model, "attention_workers": [attention], "transport": transport, "key_file": key_file}
    path.write_text(CLUSTER_FILE.format(fields=fields))
    return model, attention
