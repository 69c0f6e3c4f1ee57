"""Tests the GPU memory of scored networks: what a step takes, and what an error says if it is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datm_ray.config import NetworkSpec, RunConfig, override
from datm_ray.core.images.batches import GPU_BLOCK_BYTES
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.registry import build_network
from datm_ray.errors import WorkerLostError
from datm_ray.monitor.spent import Account
from datm_ray.pipeline import Pipeline
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe
from datm_ray.shape import DataShape
from datm_ray.stages.evaluate.memory import KEPT_MAPS, memory_remedy, scoring_step_bytes
from datm_ray.stages.evaluate.rows import EvaluateWorker
from datm_ray.stages.methods.memory import MARGIN
from tests.conftest import tiny_config

IMAGENET = DataShape((3, 224, 224), 1000, 1_281_167, is_streamed=True)


@pytest.mark.parametrize("architecture", ["resnet18", "convnet", "vgg11", "mobilenet-v2"])
def test_maps_that_are_kept_for_the_derivative_are_counted(architecture: str) -> None:
    """With the margin, the counted bytes of a step cover what torch keeps for the backward pass of one image."""
    spec = NetworkSpec(
        architecture=architecture, channels=3, size=(64, 64), classes=10, width=32, depth=4, norm="batch"
    )
    network = build_network(spec, 0)
    own = {each.untyped_storage().data_ptr() for each in (*network.parameters(), *network.buffers())}
    kept = dict[int, tuple[Tensor, int]]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network.train()(torch.rand(4, 3, 64, 64)).sum()
    assert loss.requires_grad
    cost = image_cost(network, (3, 64, 64))
    assert sum(size for _, size in kept.values()) / 4 <= MARGIN * (KEPT_MAPS * cost.maps + 2 * cost.largest)


def test_micro_batches_need_less_memory() -> None:
    """Whole batches of 1,024 images of ImageNet take tens of GiB, and parts of 128 images an eighth of the maps."""
    whole = get_recipe("imagenet-sre2l-ipc10").resolved((224, 224))
    assert whole.evaluate.batch_size == 1024
    sizes = [scoring_step_bytes(override(whole, [f"evaluate.micro_batch={each}"]), IMAGENET, 10_000) / 2**30
             for each in ("null", 512, 128)]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 24 > 12 > sizes[2]


def test_a_plan_for_gpus_counts_the_evaluation() -> None:
    """A plan tells a step's GPU memory, and names the key that lowers it if it is more than a GPU has."""
    config, shape = get_recipe("imagenet-sre2l-ipc10"), "3x224x224,1000,1281167"
    small, large = (plan_run(config, f"gpus=8,memory={each}GiB,tflops=60", shape) for each in (24, 180))
    (line,) = (each for each in small.lines() if each.startswith("  evaluation"))
    assert "--set evaluate.micro_batch=256" in line
    assert "micro_batch" not in str(large)
    assert small.evaluation_bytes == large.evaluation_bytes == small.to_json()["evaluation_gpu_bytes"]
    assert plan_run(tiny_config(), "cpus=1,gflops=50").evaluation_bytes is None


def test_a_plan_compares_the_evaluation_with_what_its_workers_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of `cluster.light` may take their share of a GPU, and `cluster.memory` limits distilling ones alone."""
    config, shape = get_recipe("imagenet-sre2l-ipc10"), "3x224x224,1000,1281167"
    shared = override(config, ["cluster.light.gpus_per_worker=0.25"])
    whole, quarter = (str(plan_run(each, "gpus=8,memory=80GiB,tflops=60", shape)) for each in (config, shared))
    assert "may be taken" not in whole
    assert "of a GPU where 20 GiB may be taken: compute a step in parts" in quarter
    light = plan_run(override(config, ["cluster.light.threads_per_worker=4"]), "gpus=8,memory=80GiB,tflops=60", shape)
    assert light.to_json()["evaluation_gpu_bytes"] is not None

    def budget(config: RunConfig) -> float:
        assert config.cluster.memory is None
        return 100 * 2**30 * (config.cluster.gpus_per_worker or 1.0)

    monkeypatch.setattr("datm_ray.stages.evaluate.memory.worker_budget", budget)
    monkeypatch.setattr("datm_ray.planning.plan.require_precision", lambda *_, **__: None)
    small = ["cluster.device=cuda", "cluster.memory=24GiB"]
    here, shared_here = (plan_run(override(each, small), shape=shape) for each in (config, shared))
    assert here.plans[0].budget == 24 * 2**30
    assert "may be taken" not in str(here)
    assert "where 25 GiB may be taken" in str(shared_here)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ((), "compute a step in parts: --set evaluate.micro_batch=256"),
        (("distill.ipc=1", "evaluate.batch_size=4096"), "compute a step in parts: --set evaluate.micro_batch=250"),
        (("evaluate.micro_batch=128",), "compute a step in parts: --set evaluate.micro_batch=32"),
        (("evaluate.micro_batch=1",), "choose a smaller network or teacher"),
        (("evaluate.batch_size=1",), "choose a smaller network or teacher"),
        (("evaluate.labels=own", "evaluate.cutmix=0", "evaluate.batch_size=1"), "choose a smaller network"),
        (
            ("evaluate.micro_batch=1", "cluster.light.gpus_per_worker=0.5"),
            "choose a smaller network or teacher, or use --set cluster.light.gpus_per_worker=1",
        ),
        (
            ("evaluate.micro_batch=1", "cluster.gpus_per_worker=0.5"),
            "choose a smaller network or teacher, or use --set cluster.gpus_per_worker=1",
        ),
    ],
)
def test_the_remedy_for_exhausted_memory_helps(changes: tuple[str, ...], remedy: str) -> None:
    """Micro-batches are advised only where they lower the memory, as parts of the images that a step has."""
    config = override(get_recipe("imagenet-sre2l-ipc10"), list(changes)).resolved((224, 224))
    assert memory_remedy(config, IMAGENET, "distilled") == remedy


def test_images_of_many_steps_that_are_prepared_together_are_counted() -> None:
    """Small batches are gathered and augmented in blocks, whose copies a step's memory covers."""
    config = tiny_config()
    assert scoring_step_bytes(config, DataShape((1, 8, 8), 10, 0), 10) >= 3 * GPU_BLOCK_BYTES


class _Gpu(str):
    """The CPU, under the name of a GPU."""

    type = "cuda"


def test_scored_images_leave_a_gpu_what_the_next_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and test images leave free what a step takes, and are placed anew for a network that takes more."""
    config, placed = tiny_config("cluster.channels_last=false", "evaluate.epochs=1"), list[tuple[int, int]]()
    large = config.network.model_copy(update={"width": 32})
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    worker = EvaluateWorker(dataset, config.cluster)

    def place(images: Any, device: torch.device, beside: int) -> Any:
        placed.append((len(images), beside))
        return torch.from_numpy(np.array(images))

    monkeypatch.setattr("datm_ray.stages.evaluate.rows.images_on", place)
    monkeypatch.setattr("datm_ray.stages.evaluate.rows.set_on", lambda images, *_: images)
    monkeypatch.setattr("datm_ray.stages.evaluate.rows.network_on", lambda network, *_: network)
    monkeypatch.setattr(
        "datm_ray.stages.evaluate.rows.Account", lambda _, cluster: Account(torch.device("cpu"), cluster)
    )
    monkeypatch.setattr("datm_ray.stages.evaluate.memory.BLOCK_COPIES", 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a GPU")
    worker._device = _Gpu("cpu")  # type: ignore[assignment]
    for number, network in enumerate((None, large, None)):
        list(
            worker.evaluate(config, "", str(tmp_path), [str(tmp_path / f"{number}.json")], "random-hard", [0], network)
        )
    shape = DataShape((1, 8, 8), 10, 0)
    needed = [scoring_step_bytes(config, shape, 10, each) for each in (None, large)]
    assert needed[0] < needed[1]
    every = (len(dataset.validation_images), len(dataset.test_images))
    assert placed == [(count, beside) for beside in needed for count in every]


@pytest.mark.parametrize(("row", "remedy"), [("random-hard", "evaluate.micro_batch=32"), ("full", "--skip-full")])
def test_a_gpu_without_memory_for_evaluation_names_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, remedy: str
) -> None:
    """The error names a key of the evaluation, and none of the distillation."""

    def fail(*_: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("datm_ray.stages.evaluate.rows.network_on", fail)
    config = tiny_config("network.width=1024", "dataset.resize=32", "distill.ipc=13", "evaluate.batch_size=500")
    worker = EvaluateWorker(Pipeline([config], str(tmp_path)).runs.dataset(config.dataset), config.cluster)
    with pytest.raises(WorkerLostError, match=remedy) as caught:
        list(worker.evaluate(config, "", str(tmp_path), [str(tmp_path / "0.json")], row, [0]))
    assert "--memory" not in str(caught.value)
