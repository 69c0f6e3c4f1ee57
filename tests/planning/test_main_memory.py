"""Tests the main memory that is reserved for a worker, against measured peaks of workers."""

from __future__ import annotations

from datm_ray.config import RunConfig, override
from datm_ray.planning.fit import Layout, plans_of
from datm_ray.planning.main_memory import GPU_PROCESS_BYTES, distilling_memory, experts_memory, scoring_memory
from datm_ray.planning.shape import DataShape
from datm_ray.recipes import get_recipe

ALLOWED = 1.3
"""Largest estimate, as a multiple of the measured peak. No estimate is below the peak."""
PLAIN, GSAM = "cluster.compile=false", "experts.optimiser=gsam"
EXPERTS = [
    (8, 32, 32, 12, 6, PLAIN, 811),
    (32, 64, 256, 2, 1, PLAIN, 971),
    (32, 64, 256, 2, 4, PLAIN, 1041),
    (32, 64, 256, 2, 1, "", 995),
    (32, 64, 256, 2, 4, "", 998),
    (32, 64, 256, 2, 2, GSAM, 961),
]
"""Side of digits in pixels, width of a ConvNet, images of a batch, epochs, stacked experts, a setting, peak in MiB."""
SCORED = [(8, 32, 10, 809), (8, 32, 1222, 804), (32, 64, 1222, 1006), (32, 128, 1222, 1227)]
"""Side of digits in pixels, width of a ConvNet, training images, peak in MiB."""


def digits(side: int, width: int, *changes: str) -> tuple[RunConfig, DataShape]:
    """A recipe of digits of that side, for a ConvNet of that width."""
    settings = [f"dataset.resize={side}", f"network.width={width}", "network.depth=null", *filter(None, changes)]
    return override(get_recipe("digits-ipc1"), settings), DataShape((1, side, side), 10, 1438, 359)


def test_the_reserved_memory_is_what_was_measured_or_little_more() -> None:
    """Estimates for experts, scored networks and a distillation are 0 to 30 % above the peak of real workers."""
    found = {}
    for side, width, batch, epochs, stacked, setting, peak in EXPERTS:
        short = f"experts.epochs={epochs}", "experts.keep_epochs=null", "distill.start_epochs=[0,1]"
        config, shape = digits(side, width, f"experts.batch_size={batch}", *short, "distill.expert_epochs=1", setting)
        found[f"experts {side} {width} {stacked} {setting}"] = experts_memory(config, shape, stacked), peak
    for side, width, images, peak in SCORED:
        found[f"scored {side} {width} {images}"] = scoring_memory(*digits(side, width), images), peak
    found["distilled"] = distilling_memory(*digits(8, 32, PLAIN)), 812
    ratios = {name: round(estimate / 2**20 / peak, 2) for name, (estimate, peak) in found.items()}
    assert {name: ratio for name, ratio in ratios.items() if not 1 <= ratio <= ALLOWED} == {}


def test_the_reserved_memory_follows_the_work() -> None:
    """More experts, images, classes of a rank and another network need more; a GPU leaves the process alone."""
    config, shape = digits(32, 128)
    assert experts_memory(config, shape, 8) > experts_memory(config, shape, 1)
    assert scoring_memory(config, shape, 1000) > scoring_memory(config, shape, 10)
    larger = config.network.model_copy(update={"width": 256})
    assert scoring_memory(config, shape, 10, larger) > scoring_memory(config, shape, 10)
    ranks = distilling_memory(config, shape, Layout(5, (), 1))
    assert ranks == max(plan.total for plan in plans_of(config, shape, Layout(5, (), 1)))
    config = override(config, ["cluster.gpus_per_worker=1", "cluster.light.gpus_per_worker=0"])
    assert distilling_memory(config, shape) == GPU_PROCESS_BYTES
    assert experts_memory(config, shape, 1) < GPU_PROCESS_BYTES > scoring_memory(config, shape, 10)
    config = override(config, ["cluster.light=null"])
    assert experts_memory(config, shape, 1) == scoring_memory(config, shape, 10) == GPU_PROCESS_BYTES
