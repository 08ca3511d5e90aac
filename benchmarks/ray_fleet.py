"""A backfill by a fleet on several nodes of Ray, of which actors and nodes die while it runs.

    pip install 'sbert-pg[embedded,ray]'
    python benchmarks/ray_fleet.py [--rows 200000] [--nodes 3] [--deaths 4] [--rate 1500]

Each node is a set of processes of its own on this machine, as Ray's tests start them. The encoder
waits as one on an accelerator would, ``--rate`` texts a second in each actor; vectors are of the
text, so that afterwards every row is compared with its own. Printed are the rows that are lost (no
vector, or that of another text), how many texts were encoded beyond one for each row, and which
share of its life an actor spent in its encoder: from its first text to its last, over all threads.
Exits with 1 where a row is lost, or where nothing died.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import ray
import sqlalchemy as sa
from scale import embedded

from sbert_pg import catalog
from sbert_pg.adapters.ray import backfill
from sbert_pg.freshness import WorkerSettings
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.wire import from_text

IDENTITY = ColumnIdentity("public", "note", "embedding")
DIMENSIONS = 32
#: A short lease, so that what an actor had in hand when it died is soon taken by another.
SETTINGS = WorkerSettings(batch_size=256, encoders=2, lease=timedelta(seconds=5))


class Node:
    """A node of a cluster, with all its processes, until it is killed at once."""

    def __init__(self, host: str, *options: str) -> None:
        command = [Path(sys.executable).with_name("ray"), "start", "--block", *options]
        command += [f"--node-ip-address={host}", "--object-store-memory=80000000"]
        command += ["--disable-usage-stats"]
        # On loopback, for some minutes. Else a node asks for the token of the home directory, where
        # there is one, and who gives an address does not send it.
        # Actors are nice by default, and would wait for everything else that the machine does.
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
        self._process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip

    def kill(self) -> None:
        """End it, as a machine that is switched off."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def await_nodes(number: int) -> None:
    """Wait until so many have joined: two that start at once may take the same socket."""
    ends = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) < number:
        if time.monotonic() > ends:
            raise TimeoutError(f"A cluster of {number} nodes did not come up within a minute.")
        time.sleep(0.2)


def setting_up(folder: Path, rate: float, deaths: int) -> Callable[[], None]:
    """Registers an encoder in an actor that writes down what it does, and dies now and then."""

    def setup() -> None:
        import os
        import signal
        import threading
        import time

        from sbert_pg.registry import use_encoder
        from sbert_pg.testing import DeterministicEncoder

        log = (folder / f"actor-{os.getpid()}").open("a", buffering=1)
        device = threading.Lock()

        class Accelerated(DeterministicEncoder):
            """One device, whatever the number of threads that use it."""

            calls = 0

            def encode_document(self, texts):
                texts = list(texts)
                vectors = super().encode_document(texts)
                self.encoded.clear()
                if not texts or not texts[0].startswith("text number"):
                    return vectors  # Texts of the probes.
                with device:
                    started = time.monotonic()
                    type(self).calls += 1
                    if self.calls == 20:
                        self.die()
                    time.sleep(len(texts) / rate)
                    log.write(f"{started} {time.monotonic()} {len(texts)}\n")
                return vectors

            def die(self):
                for number in range(deaths):
                    try:
                        (folder / f"death-{number}").touch(exist_ok=False)
                    except FileExistsError:
                        continue
                    os.kill(os.getpid(), signal.SIGKILL)

        use_encoder(Accelerated(dimensions=32))

    return setup


def lost(engine: sa.Engine) -> int:
    """Rows without a vector, or with that of another text."""
    encoder = DeterministicEncoder(dimensions=DIMENSIONS)
    wrong = 0
    with engine.connect() as connection:
        rows = connection.execution_options(yield_per=5_000).exec_driver_sql(
            "SELECT body, embedding::text FROM note"
        )
        for part in rows.partitions():
            expected = encoder.encode_document([row.body for row in part])
            encoder.encoded.clear()
            for row, vector in zip(part, expected, strict=True):
                stored = None if row.embedding is None else from_text(row.embedding)
                wrong += stored is None or not np.allclose(stored, vector, atol=1e-6)
    return wrong


def shares(folder: Path) -> tuple[int, list[float]]:
    """Texts encoded, and the busy share of each actor that encoded more than a few batches."""
    texts, busy = 0, []
    for path in folder.glob("actor-*"):
        calls = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
        texts += int(sum(count for _, _, count in calls))
        if len(calls) > 10:
            spent = sum(end - start for start, end, _ in calls)
            busy.append(spent / (calls[-1][1] - calls[0][0]))
    return texts, busy


def run(engine: sa.Engine, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Fill a table while actors die and one node vanishes, and see what came of it."""
    with engine.begin() as connection:
        catalog.upgrade(connection)
        connection.exec_driver_sql(
            f"CREATE TABLE note (id bigint PRIMARY KEY, body text, embedding vector({DIMENSIONS}))"
        )
        connection.exec_driver_sql(
            "INSERT INTO note SELECT i, 'text number ' || i"
            f" FROM generate_series(1, {options.rows}) i"
        )
        spec = EncoderSpec(name="deterministic", dimensions=DIMENSIONS)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))
    # An address for each on the loopback device, by which Ray tells nodes apart. Not 127.0.0.1, for
    # which Ray puts the machine's own.
    hosts = iter(f"127.0.0.{number}" for number in count(2))
    host = next(hosts)
    address = f"{host}:{options.port}"
    head = Node(
        host, "--head", f"--port={options.port}", "--include-dashboard=false", "--num-cpus=0"
    )
    join = f"--address={address}", "--num-cpus=1"
    ray.init(address=address, _node_ip_address=host, log_to_driver=False)
    # Only now: a node that finds no head for some seconds gives up.
    nodes = [head]
    while len(nodes) <= options.nodes:
        nodes.append(Node(next(hosts), *join))
        await_nodes(len(nodes))
    vanished = []

    def vanish(progress) -> None:
        if not vanished and progress.rows > options.rows / 3:
            vanished.append(nodes[-1])
            nodes[-1].kill()
            nodes[-1] = Node(next(hosts), *join)

    started = time.monotonic()
    try:
        done = backfill(
            engine, IDENTITY, SETTINGS, actors=options.nodes, on_progress=vanish,
            setup=setting_up(folder, options.rate, options.deaths),
        )  # fmt: skip
    finally:
        ray.shutdown()
        for node in reversed(nodes):
            node.kill()
    texts, busy = shares(folder)
    return {
        "seconds": time.monotonic() - started,
        "rows": done.rows,
        "left or failed": done.left + done.failed,
        "lost": lost(engine),
        "encoded again": texts - options.rows,
        "actors killed": len(list(folder.glob("death-*"))),
        "nodes killed": len(vanished),
        "actors that encoded": len(busy),
        "busy, least": min(busy),
        "busy, mean": sum(busy) / len(busy),
    }


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--rows", type=int, default=200_000)
    made.add_argument("--nodes", type=int, default=3, help="nodes, with one actor each")
    made.add_argument("--deaths", type=int, default=4, help="actors that are killed")
    made.add_argument("--port", type=int, default=6_380, help="of the cluster, on loopback")
    made.add_argument("--rate", type=float, default=1_500, help="texts a second and actor")
    return made


def fleet(options: argparse.Namespace) -> dict[str, float]:
    """The whole, on a server of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="sbert-pg-fleet-") as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "actors"
        folder.mkdir()
        with embedded(Path(name) / "data") as engine:
            return run(engine, options, folder)


def good(report: dict[str, float]) -> bool:
    """Whether nothing was lost, and it was put to the test."""
    put = report["actors killed"] > 0 and report["nodes killed"] > 0
    return put and report["lost"] == report["left or failed"] == 0


if __name__ == "__main__":
    report = fleet(parser().parse_args())
    for name, value in report.items():
        print(f"{name:22} {value:,.3f}" if isinstance(value, float) else f"{name:22} {value:,}")
    raise SystemExit(not good(report))
