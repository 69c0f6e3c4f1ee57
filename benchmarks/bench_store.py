"""Bytes on the wire and latency of what one matching iteration reads: this store against a pickled replay buffer.

python benchmarks/bench_store.py [--quick]         (make bench-store)

S3 is moto's server, in a process of its own on this machine; bytes are counted there, where the answers leave, headers
included. Its latency is not S3's: it has no network, so some rows add one to every answer, and it reads the whole file
for each range of it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import common_facts, head, parsed, result_path, save, sizes_and_places

from datm_ray.config import NetworkSpec
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.interop.replay_buffers import export_replay_buffers
from datm_ray.runtime.ahead import Ahead
from datm_ray.store.cache import FOLDER
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.trajectories import ExpertGroup, GroupKey, Snapshot, TrajectoryInfo, TrajectoryStore

HEADER = """Random parameters of the shapes of the network named above. A pair is a start and a target epoch of one
expert, each drawn anew (seed 0), in one `read_params`; the footer of every expert has been read before.

- MiB a pair: on the wire, answers with their headers, mean over the pairs; local files: of the snapshots mapped.
  share: of two snapshots of the stored type. times fewer: than the bytes of the replay buffer, which has to be loaded
  whole.
- p50, p99: milliseconds of one call, digests checked and vectors copied into the caller's memory.
- `cold`: the file's pages are dropped from the page cache before each pair; the disk may keep its own cache.
- `S3`: moto's server on this machine, which reads the whole file (65 MB in float32) for each range: bytes are S3's,
  milliseconds are not.
- `+ d ms`: every answer of the S3 server is held back that long. `ahead`: read by the thread of `Ahead` one
  iteration of w ms before; what is timed is the wait that is left. `again`: with DATM_RAY_CACHE, pairs read before."""

KEY = GroupKey("random", "convnet", "bench")


@dataclass(frozen=True)
class Row:
    """Measurements of one way to read."""

    name: str
    pairs: int
    bytes_per_pair: float
    share: float
    """Bytes on the wire for a pair, divided by the bytes of two stored snapshots."""
    times_fewer: float
    p50: float
    p99: float
    """50th and 99th percentile of a call's duration, in milliseconds (`p50` and `p99`)."""

    def line(self) -> str:
        """Format the row for the table."""
        fewer = f"{self.times_fewer:,.0f}" if self.bytes_per_pair else ""
        size, share = f"{self.bytes_per_pair / 2**20:.3f}", f"{self.share:.4f}"
        return f"| {self.name} | {size} | {share} | {fewer} | {self.p50:.2f} | {self.p99:.2f} | {self.pairs} |"


COLUMNS = "read | MiB a pair | share | times fewer | p50, ms | p99, ms | n"


class Server:
    """moto's S3 server in another process, which counts what it sends."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.sent: Synchronized[int] = context.Value("q", 0)
        self._delay: Synchronized[float] = context.Value("d", 0.0)
        ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.sent, self._delay), daemon=True)
        self._process.start()
        self.url = f"http://127.0.0.1:{ours.recv()}"

    @contextmanager
    def delayed(self, seconds: float) -> Iterator[None]:
        """Delay every answer in the block by some seconds."""
        self._delay.value = seconds
        yield
        self._delay.value = 0.0

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def serve(port: Any, sent: Synchronized[int], delay: Synchronized[float]) -> None:
    """Run the server process of `Server`."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class CountedFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            with sent.get_lock():
                sent.value += len(data)
            return int(self._file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as S3's do

        def setup(self) -> None:
            super().setup()
            self.wfile = CountedFile(self.wfile)

        def run_wsgi(self) -> None:
            time.sleep(delay.value)
            super().run_wsgi()

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    port.send(server.server_port)
    server.serve_forever()


def spec(quick: bool) -> NetworkSpec:
    """The network whose experts are stored: the one of the published CIFAR-10 runs."""
    return NetworkSpec(channels=3, size=(32, 32), classes=10, width=16 if quick else 128, depth=3)


def write_experts(uri: str, network: FlatNetwork, experts: int, epochs: int, storage: str) -> ExpertGroup:
    """Fill a store with experts whose parameters are noise around an initialisation."""
    group = TrajectoryStore(uri).group(*str(KEY).split("/"))
    initial, draw = flatten(network.module).numpy(), np.random.default_rng(0)
    info = TrajectoryInfo(
        dataset=KEY.dataset,
        dataset_fingerprint="random",
        architecture=KEY.architecture,
        recipe={},
        fingerprint=KEY.fingerprint,
        seed=0,
        expert=0,
        parameter_names=network.names,
        parameter_shapes=network.shapes,
        epochs=tuple(range(epochs + 1)),
        storage=storage,
    )
    for expert in range(experts):
        noise = (draw.standard_normal((1, len(initial)), np.float32) for _ in info.epochs)
        snapshots = (Snapshot(epoch, epoch, 0.0, 0.0, initial + 0.01 * row[0]) for epoch, row in enumerate(noise))
        group.write_expert(expert, snapshots, replace(info, expert=expert))
    return group


def pairs(count: int, experts: int, epochs: int) -> list[tuple[int, list[int]]]:
    """Random (expert, [start, target]), as an iteration draws them."""
    draw = np.random.default_rng(0)
    starts = draw.integers(0, epochs - 2, count)
    return [(int(draw.integers(experts)), [int(start), int(start) + 2]) for start in starts]


def timed(reads: Sequence[Callable[[], object]], before: Callable[[], object] = lambda: None) -> list[float]:
    """Milliseconds of each read; `before` runs untimed ahead of it."""
    durations = []
    for read in reads:
        before()
        begin = time.perf_counter()
        read()
        durations.append(1000 * (time.perf_counter() - begin))
    return durations


class Bench:
    """Measures rows one after another and keeps them."""

    def __init__(self, quick: bool, experts: int, epochs: int, count: int) -> None:
        self.network = FlatNetwork(build_network(spec(quick), seed=0))
        self.experts, self.epochs = experts, epochs
        self.draws = pairs(count, experts, epochs)
        self.buffer_bytes = 0
        self.rows: list[Row] = []

    def add(self, name: str, durations: list[float], sent: float, value_bytes: int = 4) -> None:
        """Add a row and print it."""
        count = len(durations)
        two = 2 * value_bytes * self.network.count
        cuts = statistics.quantiles(durations, n=100, method="inclusive") if count > 1 else durations * 99
        fewer = self.buffer_bytes / (sent / count) if sent else 0.0
        self.rows.append(Row(name, count, sent / count, sent / count / two, fewer, cuts[49], cuts[98]))
        print(self.rows[-1].line(), flush=True)

    def local(self, folder: Path) -> None:
        """Measure a local store, and the replay buffer of the same experts."""
        group = write_experts(str(folder / "float32"), self.network, self.experts, self.epochs, "float32")
        (name,) = export_replay_buffers(group, open_location(str(folder)), per_file=self.experts).files
        buffer = folder / name
        self.buffer_bytes = buffer.stat().st_size

        def drop_pages() -> None:
            for file in folder.rglob("*.arrow"):
                with file.open("rb") as open_file:
                    os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        os.sync()
        loads = timed([lambda: torch.load(buffer, weights_only=True)] * 3)
        self.add(f"replay buffer of {self.experts} experts, torch.load, local", loads, 3 * self.buffer_bytes)
        reads = [lambda draw=draw: group.read_params(*draw) for draw in self.draws]
        timed(reads[:20])
        mapped = 2.0 * 4 * self.network.count
        self.add("local", timed(reads), mapped * len(reads))
        self.add("local, cold", timed(reads, drop_pages), mapped * len(reads))

    def remote(self, server: Server, uri: str, storage: str, delays: Sequence[float], think: float) -> None:
        """Measure a store on S3: without and with added latency, and read ahead."""
        group = write_experts(uri, self.network, self.experts, self.epochs, storage)
        value_bytes = 4 if storage == "float32" else 2
        for expert in range(self.experts):
            group.read_info(expert)
        reads = [lambda draw=draw: group.read_params(*draw) for draw in self.draws]
        timed(reads[:20])
        name = "S3" if storage == "float32" else f"S3, {storage}"
        for delay in (0.0, *delays):
            with server.delayed(delay), self.counting(server) as sent:
                durations = timed(reads)
            shown = f"{name} + {1000 * delay:.0f} ms" if delay else name
            self.add(shown, durations, sent(), value_bytes)
            if storage == "float32" and delay:
                with server.delayed(delay), self.counting(server) as sent:
                    durations = self.read_ahead(group, think)
                self.add(f"{shown}, ahead (w = {1000 * think:.0f})", durations, sent(), value_bytes)

    def read_ahead(self, group: ExpertGroup, think: float) -> list[float]:
        """Measure the wait for pairs read one iteration before, where an iteration only sleeps."""
        ahead, durations = Ahead(lambda number: group.read_params(*self.draws[number]), len(self.draws)), []
        for number in range(len(self.draws)):
            durations += timed([lambda number=number: ahead.get(number)])
            time.sleep(think)
        ahead.close()
        return durations

    def cached(self, server: Server, uri: str, folder: Path) -> None:
        """Measure pairs that are in the local cache."""
        os.environ[FOLDER] = str(folder / "cache")
        group = TrajectoryStore(uri).group(*str(KEY).split("/"))
        reads = [lambda draw=draw: group.read_params(*draw) for draw in self.draws]
        timed(reads)
        with self.counting(server) as sent:
            durations = timed(reads)
        self.add("S3, again", durations, sent())
        del os.environ[FOLDER]

    @contextmanager
    def counting(self, server: Server) -> Iterator[Callable[[], int]]:
        """Yields a function that returns the bytes sent by the server in the block."""
        before = server.sent.value
        yield lambda: after - before
        after = server.sent.value


def main() -> None:
    """Measure all rows; print and save them."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--pairs", type=int, help="pairs of each row; 300, with --quick 20")
    arguments = parsed(parser)
    experts, epochs = (2, 10) if arguments.quick else (10, 50)
    bench = Bench(arguments.quick, experts, epochs, arguments.pairs or (20 if arguments.quick else 300))
    facts = {
        **common_facts(__file__, sys.argv[1:]),
        "experts": f"{experts} with epochs 0 to {epochs} of ConvNet-3/{spec(arguments.quick).width} at 32×32, "
        f"{bench.network.count:,} parameters",
    }
    lines = [*head("Trajectory store", facts), HEADER, ""]
    lines += [f"| {COLUMNS} |", "| --- " * 7 + "|"]
    print("\n".join(lines), flush=True)
    folder, server = Path(tempfile.mkdtemp(prefix="bench-store-")), Server()
    try:
        os.environ.update(
            AWS_ENDPOINT_URL=server.url,
            AWS_ACCESS_KEY_ID="bench",
            AWS_SECRET_ACCESS_KEY="bench",
            AWS_DEFAULT_REGION="us-east-1",
        )
        os.environ.pop(FOLDER, None)
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/bench", method="PUT")).close()
        bench.local(folder)
        bench.remote(server, "s3://bench/float32", "float32", [0.03], think=0.01 if arguments.quick else 0.2)
        bench.cached(server, "s3://bench/float32", folder)
        bench.remote(server, "s3://bench/bfloat16", "bfloat16", [], think=0.0)
    finally:
        server.close()
        shutil.rmtree(folder)
    lines += [row.line() for row in bench.rows]
    if arguments.out:
        save(result_path(arguments.out, "store"), lines, {**facts, "rows": [asdict(row) for row in bench.rows]})


if __name__ == "__main__":
    main()
