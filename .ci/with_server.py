"""Run a command with SBERT_PG_TEST_DSN naming a server that this script starts and stops."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sbert_pg.embedded import embedded_server

#: As the tests have them on a server of their own.
SETTINGS = {
    "autovacuum": "off",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "100",
}

with tempfile.TemporaryDirectory(prefix="sbert-pg-ci-") as folder:
    os.chmod(folder, 0o755)
    with embedded_server(Path(folder) / "data", settings=SETTINGS) as server:
        environment = os.environ | {"SBERT_PG_TEST_DSN": server.dsn()}
        sys.exit(subprocess.run(sys.argv[1:], env=environment, check=False).returncode)
