"""Tests costs: measured from the start of the work, summed over workers and attempts, shown in files and report."""

from __future__ import annotations

import dataclasses
import json
import mmap
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datm_ray.config import ClusterConfig
from datm_ray.errors import CorruptFileError
from datm_ray.monitor import spent as spent_module
from datm_ray.monitor.progress import Reporter
from datm_ray.monitor.spent import Account, Spent, total
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import Progress, SerialExecutor
from datm_ray.runtime.machine.devices import peak_memory
from datm_ray.runtime.mesh import ALONE, Mesh
from datm_ray.runtime.stopping import Interrupted
from datm_ray.stages.distill.task import COST, DistillWorker, least_of_workers, over_workers, read_cost
from datm_ray.stages.experts import progress
from datm_ray.stages.experts.train import ExpertWorker, expert_group, experts_cost
from datm_ray.store.files.filesystem import open_location
from tests.conftest import tiny_config

CPU, QUIET = torch.device("cpu"), Reporter(quiet=True)


def can_forget_peaks() -> bool:
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii"):
        return True
    return False


def test_costs_add_up_but_for_the_peak() -> None:
    """Costs add up, except memory, which is the largest worker's; plain data restores them."""
    both = Spent(1, 2, 3, 50, 5, 6) + Spent(10, 20, 30, 40, 50, 60)
    assert both == Spent(11, 22, 33, 50, 55, 66) == total([both, Spent()])
    assert Spent.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert both.share(0.5) == Spent(5.5, 11, 16.5, 50, 27.5, 33)


def test_a_sum_with_a_cost_that_is_partly_unknown_is_one() -> None:
    """Sums and shares of a partial cost are partial, as is what plain data restores; other data do not name it."""
    lost = Spent(1, 2, is_partial=True)
    restored = Spent.from_json(json.loads(json.dumps(lost.to_json())))
    for each in (lost + Spent(1), Spent(1) + lost, lost.share(0.5), restored):
        assert each.is_partial
    assert not (Spent(1) + Spent(2)).is_partial
    assert "is_partial" not in Spent(1).to_json()


def test_an_account_knows_nothing_of_what_was_before_it(tmp_path: Path) -> None:
    """An account leaves out earlier seconds and bytes; a lap starts anew."""
    file = open_location(str(tmp_path / "file"))
    file.write_atomic(b"x" * 100)
    file.read_bytes()
    account = Account(CPU, ClusterConfig())
    assert (account.spent().read_bytes, account.spent().write_bytes) == (0, 0)
    assert account.spent().cpu_seconds < 0.5
    file.read_bytes()
    while account.spent().cpu_seconds < 0.05:
        torch.randn(100, 100).exp()
    lap = account.lap()
    assert lap.read_bytes == 100
    assert lap.seconds > 0
    assert lap.cpu_seconds >= 0.05
    assert lap.gpu_seconds == 0, "there is none"
    assert account.spent().read_bytes == 0
    assert account.spent().cpu_seconds < lap.cpu_seconds


@pytest.mark.skipif(not can_forget_peaks(), reason="this system does not let a process forget its peak")
def test_the_peak_is_that_of_the_work() -> None:
    """The peak leaves out memory that was freed before the work."""
    hold_and_let_go(300 * 2**20)
    before = peak_memory(CPU)
    account = Account(CPU, ClusterConfig())
    peak = account.spent().peak_memory_bytes
    assert peak < before - 200 * 2**20
    hold_and_let_go(300 * 2**20)
    assert account.spent().peak_memory_bytes > peak + 200 * 2**20


def hold_and_let_go(size: int) -> None:
    """Hold pages of their own and free them at once; a session's heap may keep its pages."""
    with mmap.mmap(-1, size) as pages:
        for first in range(0, size, mmap.PAGESIZE):
            pages[first] = 1


def test_seconds_of_a_gpu_are_those_of_the_share_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a GPU for four seconds is one GPU-second."""
    monkeypatch.setattr(spent_module, "_forget_peak", lambda _: None)
    monkeypatch.setattr(spent_module, "peak_memory", lambda _: 7.0)
    readings = iter([(0.0, 0.0, 0.0, 0.0), (4.0, 1.0, 2.0, 3.0)])
    monkeypatch.setattr(Account, "_read", staticmethod(lambda: next(readings)))
    account = Account(torch.device("cuda"), ClusterConfig(gpus_per_worker=0.25))
    assert account.spent() == Spent(4.0, 1.0, 1.0, 7.0, 2.0, 3.0)


def test_a_gpu_is_awake_before_its_peak_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker initialises CUDA before it resets the peak, because its first task may precede all GPU work."""
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(str(device)))
    spent_module._forget_peak(torch.device("cuda"))
    assert calls == ["init", "cuda"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_of_a_gpu_is_that_of_the_work() -> None:
    """A GPU's peak leaves out memory that was freed before the work."""
    device = torch.device("cuda")
    held = torch.zeros(2**26, device=device)
    del held
    account = Account(device, ClusterConfig(gpus_per_worker=0.5))
    again = torch.zeros(2**20, device=device)
    spent = account.spent()
    assert 2**22 <= spent.peak_memory_bytes < 2**27
    assert spent.gpu_seconds == pytest.approx(spent.seconds / 2)
    del again


class WithAnother(Mesh):
    """A mesh of two whose other worker has costs too."""

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        if len(tensor) == 2:
            assert tensor.tolist() == [0.0, 4.0], "each worker's peak has a place of its own"
            return tensor + torch.tensor([99.0, 0], dtype=torch.float64)
        return tensor + torch.tensor([10.0, 20, 30, 40, 50], dtype=torch.float64)


def test_workers_of_a_mesh_are_added_up() -> None:
    """A mesh adds seconds and bytes of all workers, and takes the highest peak."""
    mesh = WithAnother(rank=1, rows=1, columns=2)
    assert over_workers(mesh, Spent(1, 2, 3, 4, 5, 6)) == Spent(11, 22, 33, 99, 45, 56)
    assert over_workers(ALONE, Spent(1, 2, 3, 4, 5, 6)) == Spent(1, 2, 3, 4, 5, 6)


class WithAnothersNumber(Mesh):
    """A mesh of three whose first worker has the number 7, and the last none."""

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        return tensor + torch.tensor([7.0, 0, 0], dtype=torch.float64)


def test_workers_agree_on_the_smallest_number() -> None:
    """Workers of a mesh take the smallest number of any of them, without those that have none."""
    mesh = WithAnothersNumber(rank=1, rows=3, columns=1)
    assert [least_of_workers(mesh, own) for own in (3, 9, 0)] == [3, 7, 7]
    assert [least_of_workers(ALONE, own) for own in (3, 0)] == [3, 1]


def test_every_part_of_a_run_records_its_cost(finished_run: Path) -> None:
    """Experts, distillation and each row have their cost in files, summary and page."""
    (summary,) = json.loads((finished_run / "summary.json").read_text())
    parts = {part["what"]: part for part in summary["cost"]}
    assert list(parts) == [
        "experts, convnet",
        "distillation",
        "random real images, hard labels",
        "random real images, soft labels",
        "distilled",
        "all real data",
    ]
    assert [part["n"] for part in summary["cost"]] == [2, 1, 2, 2, 2, 2]
    for name, part in parts.items():
        assert part["cpu_seconds"] > 0, name
        assert part["seconds"] > 0, name
        assert part["gpu_seconds"] == 0 or torch.cuda.is_available()
        assert part["peak_memory_bytes"] > 2**20, name
    needed = 6 * 2 * 4 * 1_000  # two snapshots an iteration; the tiny network has 1,000 parameters at least, of 4 bytes
    assert parts["distillation"]["read_bytes"] > needed
    assert parts["random real images, hard labels"]["read_bytes"] == 0
    assert parts["random real images, soft labels"]["read_bytes"] > 0
    for place in finished_run.rglob("*-0[01].json"):
        if place.parent.name != "costs":
            result = json.loads(place.read_text())
            assert result["cost"]["seconds"] == pytest.approx(result["seconds"], abs=1e-3)
    page = (finished_run / "report.html").read_text()
    assert "experts, convnet</th><td>2</td>" in page
    assert " s CPU</td>" in page


def test_a_resumed_distillation_adds_to_what_it_had_cost(finished_run: Path, tmp_path: Path) -> None:
    """A resumed distillation adds to its earlier cost and ends with the bits of an uninterrupted run."""
    (tmp_path / "experts").symlink_to(finished_run / "experts")
    config = tiny_config()
    pipeline = Pipeline([config], str(tmp_path))
    with suppress(KeyboardInterrupt):
        pipeline.distill(lambda: StopsAt(config.cluster, iteration=3), QUIET)
    place = open_location(str(tmp_path / "tiny"))
    first = read_cost(place)
    assert first.cpu_seconds > 0
    (place / COST).write_json(dataclasses.replace(first, cpu_seconds=1e6, peak_memory_bytes=2.0**50).to_json())
    pipeline.distill(lambda: SerialExecutor(config.cluster), QUIET)
    assert read_cost(place).cpu_seconds > 1e6
    assert read_cost(place).peak_memory_bytes == 2.0**50
    assert read_cost(place).seconds > first.seconds
    both = [(out / "tiny" / "synthetic.arrow").read_bytes() for out in (tmp_path, finished_run)]
    assert both[0] == both[1]


def test_a_distillation_that_is_stopped_loses_no_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a distillation that was stopped and resumed is the sum of its attempts, and known as a whole."""
    monkeypatch.setattr(Account, "spent", lambda _: Spent(9.0, cpu_seconds=7.0))
    config = tiny_config("method=dm", "distill.validate_every=0", "distill.real_batch=8")
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    arguments, place = (config, str(tmp_path), str(tmp_path / "tiny")), open_location(str(tmp_path / "tiny"))
    asked = [False]
    monkeypatch.setattr("datm_ray.stages.distill.task.saving", lambda: nullcontext(lambda: asked[0]))
    events = DistillWorker(dataset, config.cluster).distill(*arguments)
    assert next(event for event in events if isinstance(event, Progress) and event.done == 2)
    asked[0] = True
    with pytest.raises(Interrupted):
        list(events)
    asked[0] = False
    assert read_cost(place) == Spent(9.0, cpu_seconds=7.0)
    assert list(DistillWorker(dataset, config.cluster).distill(*arguments))
    assert read_cost(place) == Spent(18.0, cpu_seconds=14.0)


class StopsAt(SerialExecutor):
    """Ends like a dead worker after an iteration that follows a checkpoint."""

    def __init__(self, cluster: ClusterConfig, iteration: int) -> None:
        super().__init__(cluster)
        self._iteration = iteration

    def run(self, *arguments: object) -> Iterator:  # type: ignore[type-arg]
        for task, event in super().run(*arguments):  # type: ignore[arg-type]
            yield task, event
            if isinstance(event, Progress) and event.done == self._iteration:
                raise KeyboardInterrupt


def test_a_resumed_expert_adds_to_what_it_had_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of an expert's progress records a part of the cost; deleting a group deletes its cost."""
    monkeypatch.setattr(progress, "WRITE_SHARE", 1e9)
    laps = [0]

    def lap(account: Account) -> Spent:
        laps[0] += 1
        return Spent(cpu_seconds=100.0)

    monkeypatch.setattr(Account, "lap", lap)
    monkeypatch.setattr(Account, "spent", lambda _: Spent(cpu_seconds=1.0))
    config = tiny_config()
    pipeline = Pipeline([config], str(tmp_path))
    dataset = pipeline.runs.dataset(config.dataset)
    group = expert_group(pipeline.store_uri, config, dataset.name, dataset.fingerprint)
    for event in ExpertWorker(dataset, config.cluster).train(config, pipeline.store_uri, (0, 1)):
        if isinstance(event, Progress) and event.done == 3:
            break
    assert group.costs() == []
    before = laps[0]
    assert before >= 2
    assert list(ExpertWorker(dataset, config.cluster).train(config, pipeline.store_uri, (0, 1)))
    (note,) = group.costs()
    cost = note.read_json()
    assert cost["experts"] == [0, 1]
    one = config.model_copy(update={"experts": config.experts.model_copy(update={"count": 1})})
    both, half = (experts_cost(each, group).spent.cpu_seconds for each in (config, one))
    assert half == both / 2, "a stack was trained for both of its experts"
    assert cost["spent"]["cpu_seconds"] == 100.0 * laps[0] + 1.0
    assert "is_partial" not in cost["spent"], "an attempt that ends early leaves no gap in the record"
    for content in (b"[", b"5", b'{"experts": [0]}', b'{"experts": ["x"], "spent": {}}'):
        note.write_atomic(content)
        with pytest.raises(CorruptFileError, match=rf"^{note.uri} .*Move this note away; the experts stay"):
            experts_cost(config, group)
    assert laps[0] > before
    group.remove()
    assert group.costs() == []
    assert not list(Path(tmp_path, "experts").rglob("costs"))
