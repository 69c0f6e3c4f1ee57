"""Bytes and speed of writing labels and of playing them back: the label store against a pickle for each batch.

python benchmarks/bench_labels.py [--quick]         (make bench-labels)

Published programs (FKD, SRe2L) store each batch of each epoch with torch.save, and read it back in the same batches.
The teacher is left out: logits are random, and ready before the clock starts.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from facts import common_facts, head, parsed, present, sizes_and_places
from numpy.typing import NDArray
from program import positive
from tables import spread, table
from torch import Tensor
from torch.utils.data import DataLoader

from datm_ray.core.training.labelling import Views, apply_views, draw_views, pack_logits, unpack_logits
from datm_ray.replay import ReplayedLabels, views_of
from datm_ray.stages.labels import create_labels
from datm_ray.store.labels import LabelRecords, LabelStore

HEADER = """Labels of all images in some epochs are written, then read twice in equal batches: alone, and with
the views made of the images, by the same function for all ways. Every turn has all ways, one after another; thousands a
second, median (smallest to largest) over the turns. Files are in the page cache when they are read.

- bytes: on disk for one label, that is one image in one epoch, everything included.
- `pickles`: torch.save of a batch's crops, flips, partners, share, box and float16 logits, as FKD does; torch.load with
  weights_only, which executes nothing. Only whole batches can be read, in the order of the labelling.
- `store`: checksums are written and verified, and each epoch is flushed to the disk, which torch.save does not do."""

COLUMNS = ("way", "bytes", "written, 1000 labels/s", "read, 1000 labels/s", "with views, 1000 images/s")


@dataclass(frozen=True)
class Sizes:
    """Numbers of what is labelled."""

    images: int
    classes: int
    side: int
    epochs: int
    batch: int

    @property
    def labels(self) -> int:
        """Number of labels: one for each image in each epoch."""
        return self.images * self.epochs


Played = Iterator[tuple[Views, Tensor]]


@dataclass
class Way:
    """One way of keeping labels, and seconds of each turn."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Played]
    """Function that yields views and logits of all batches of all epochs from a folder."""
    played: Callable[[Path], Iterator[Tensor]] | None = None
    """Function that yields views of the images from a folder; `None` applies `apply_views` to what `read` yields."""
    bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "read": [], "views": []})


class Labels:
    """Images, views and logits to be stored."""

    def __init__(self, sizes: Sizes) -> None:
        draw = torch.Generator().manual_seed(0)
        self.sizes = sizes
        self.images = torch.randn(sizes.images, 3, sizes.side, sizes.side, generator=draw)
        self.logits = [3 * torch.randn(sizes.images, sizes.classes, generator=draw) for _ in range(sizes.epochs)]

    def views(self, epoch: int) -> Views:
        """Views of all images in an epoch."""
        return draw_views(0, epoch, self.sizes.images, (self.sizes.side, self.sizes.side))

    def orders(self, *, shuffled: bool) -> list[NDArray[np.int64]]:
        """Order of the images in each epoch."""
        draw, count = np.random.default_rng(0), self.sizes.images
        return [draw.permutation(count) if shuffled else np.arange(count) for _ in range(self.sizes.epochs)]

    def batches(self, order: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.int64]]:
        """Consecutive parts of an order, of `batch` images each; the last one may be smaller."""
        return (order[first : first + batch] for first in range(0, len(order), batch))

    def write_store(self, place: Path, top: int | None) -> None:
        """Write all epochs into a label store, a batch at a time."""
        sizes = self.sizes
        store = create_labels(str(place), self.images, sizes.classes, "random", epochs=sizes.epochs, top=top)
        for epoch, logits in enumerate(self.logits):
            store.write_epoch(epoch, self._records(self.views(epoch), logits, top))

    def _records(self, drawn: Views, logits: Tensor, top: int | None) -> Iterator[LabelRecords]:
        for rows in self.batches(drawn.rows, self.sizes.batch):
            views = drawn.take(rows)
            packed = pack_logits(logits[torch.from_numpy(rows)], top)
            yield LabelRecords(
                views.boxes, views.flips, views.partners, views.lambdas, views.mix_boxes, packed[0], packed[1]
            )

    def read_store(self, place: Path, batch: int, *, shuffled: bool) -> Played:
        """Read all epochs of a label store in batches of any size."""
        store = LabelStore(str(place))
        for epoch, order in enumerate(self.orders(shuffled=shuffled)):
            for rows in self.batches(order, batch):
                records = store.read(epoch, rows)
                logits = unpack_logits(records.values, records.indices, self.sizes.classes)
                yield views_of(rows, records), logits

    def load_store(self, place: Path, batch: int) -> Iterator[Tensor]:
        """Play all epochs of a label store back through a shuffling `DataLoader` in this process."""
        labels = ReplayedLabels(self.images, str(place))
        for epoch in range(self.sizes.epochs):
            labels.set_epoch(epoch)
            for views, _ in DataLoader(labels, batch_size=batch, shuffle=True):
                yield views

    def write_pickles(self, place: Path) -> None:
        """Write a file for each batch, as FKD does: one share and one box for the batch, partners in the batch."""
        draw = torch.Generator().manual_seed(0)
        for epoch, logits in enumerate(self.logits):
            folder, drawn = place / f"epoch_{epoch}", self.views(epoch)
            folder.mkdir(parents=True)
            for number, rows in enumerate(self.batches(drawn.rows, self.sizes.batch)):
                views = drawn.take(rows)
                crops, flips = torch.from_numpy(views.boxes), torch.from_numpy(views.flips)
                partners = torch.randperm(len(rows), generator=draw)
                share, box = float(views.lambdas[0]), views.mix_boxes[0].tolist()
                content = [crops, flips, partners, share, box, logits[torch.from_numpy(rows)].half()]
                torch.save(content, folder / f"batch_{number}.tar")

    def read_pickles(self, place: Path) -> Played:
        """Read all batches of all epochs in the order of the labelling."""
        for epoch in range(self.sizes.epochs):
            for number, rows in enumerate(self.batches(np.arange(self.sizes.images), self.sizes.batch)):
                content = torch.load(place / f"epoch_{epoch}" / f"batch_{number}.tar", weights_only=True)
                crops, flips, partners, share, box, logits = content
                views = Views(
                    rows=rows,
                    boxes=crops.numpy(),
                    flips=flips.numpy(),
                    partners=rows[partners.numpy()].astype(np.int32),
                    lambdas=np.full(len(rows), share, np.float32),
                    mix_boxes=np.tile(np.array(box, np.uint16), (len(rows), 1)),
                )
                yield views, logits.float()


def ways(labels: Labels, top: int) -> list[Way]:
    """Every way that is measured."""
    batch, small = labels.sizes.batch, max(1, labels.sizes.batch // 4)

    def store(name: str, kept: int | None, size: int, *, shuffled: bool) -> Way:
        return Way(
            name,
            lambda place: labels.write_store(place, kept),
            lambda place: labels.read_store(place, size, shuffled=shuffled),
        )

    in_order = f"batches of {batch} in order"
    through_loader = store(f"store, `DataLoader`, {batch} shuffled", None, batch, shuffled=True)
    through_loader.played = lambda place: labels.load_store(place, batch)
    return [
        Way(f"pickles, {in_order}", labels.write_pickles, labels.read_pickles),
        store(f"store, {in_order}", None, batch, shuffled=False),
        store(f"store, {batch} shuffled", None, batch, shuffled=True),
        store(f"store, {small} shuffled", None, small, shuffled=True),
        through_loader,
        store(f"store, top {top}, {batch} shuffled", top, batch, shuffled=True),
    ]


def measure(way: Way, labels: Labels, folder: Path) -> None:
    """Take one turn of a way."""

    def timed(what: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        way.seconds[what].append(time.perf_counter() - begin)

    place = Path(tempfile.mkdtemp(dir=folder)) / "labels"
    timed("write", lambda: way.write(place))
    way.bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    timed("read", lambda: [logits.sum() for _, logits in way.read(place)])
    made = way.played or (lambda place: (apply_views(labels.images, views) for views, _ in way.read(place)))
    timed("views", lambda: [views.shape for views in made(place)])
    shutil.rmtree(place.parent)


def cells(way: Way, count: int) -> list[str]:
    """Cells of a row under `COLUMNS`."""
    speeds = [spread([count / seconds / 1000 for seconds in way.seconds[what]]) for what in way.seconds]
    return [way.name, f"{way.bytes / count:.1f}", *speeds]


def main() -> None:
    """Measure all ways in turns; print and save them."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--turns", type=positive, help="turns of all ways; 5, with --quick 2")
    arguments = parsed(parser)
    sizes = Sizes(200, 20, 16, 2, 50) if arguments.quick else Sizes(2000, 200, 64, 5, 128)
    turns, labels = arguments.turns or (2 if arguments.quick else 5), Labels(sizes)
    facts = {
        **common_facts(__file__, sys.argv[1:]),
        "labels": f"{sizes.images} images of {sizes.side}×{sizes.side}, {sizes.classes} classes, {sizes.epochs} epochs",
        "turns": f"{turns}; torch with {torch.get_num_threads()} thread(s)",
    }
    measured = ways(labels, max(1, sizes.classes // 10))
    folder = Path(tempfile.mkdtemp(prefix="bench-labels-"))
    try:
        for turn in range(turns):
            for way in measured:
                measure(way, labels, folder)
            print(f"turn {turn + 1} of {turns} is done", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    rows = [cells(way, sizes.labels) for way in measured]
    lines = [*head("Labels", facts), HEADER, "", *table(COLUMNS, rows)]
    kept = [{"way": way.name, "bytes": way.bytes, "seconds": way.seconds} for way in measured]
    present(arguments.out, "labels", lines, {**facts, "rows": kept})


if __name__ == "__main__":
    main()
