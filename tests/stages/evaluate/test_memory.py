"""Tests the GPU memory of scored networks: what a step takes, and what an error says if it is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datm_ray.config import NetworkSpec, override
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.registry import build_network
from datm_ray.errors import WorkerLostError
from datm_ray.pipeline import Pipeline
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe
from datm_ray.shape import DataShape
from datm_ray.stages.evaluate.memory import KEPT_MAPS, scoring_step_bytes
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


@pytest.mark.parametrize(("row", "remedy"), [("random-hard", "evaluate.micro_batch=32"), ("full", "--skip-full")])
def test_a_gpu_without_memory_for_evaluation_names_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, remedy: str
) -> None:
    """The error names a key of the evaluation, and none of the distillation."""

    def fail(*_: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("datm_ray.stages.evaluate.rows.network_on", fail)
    config = tiny_config()
    worker = EvaluateWorker(Pipeline([config], str(tmp_path)).runs.dataset(config.dataset), config.cluster)
    with pytest.raises(WorkerLostError, match=remedy) as caught:
        list(worker.evaluate(config, "", str(tmp_path), [str(tmp_path / "0.json")], row, [0]))
    assert "--memory" not in str(caught.value)
