"""Estimate of a run before it starts; for a described cluster, in the layout that suits the cluster best.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.errors import ConfigError
from datm_ray.planning.duration import Proposal
from datm_ray.planning.machines import Machine, machine_here, parse_cluster
from datm_ray.planning.measure import measured
from datm_ray.runtime.executor import require_precision
from datm_ray.runtime.machine.devices import fix_workspace, workers_here
from datm_ray.shape import DataShape, data_shape, fitting_cost, parse_shape
from datm_ray.stages.methods.memory import laid_out, plans_of
from datm_ray.stages.methods.registry import method_of


def plan_run(
    config: RunConfig, cluster: str | None = None, shape: str | None = None, *, measure: bool = False, wanted: int = 0
) -> Proposal:
    """Estimate memory, hours and storage of a run.

    Args:
        cluster: description of a cluster, for which a layout is suggested; `None` for this machine and the recipe's own
            layout.
        shape: shape of a data set that is not on this machine, as channels x height x width, number of classes, and
            number of training images, such as "3x64x64,200,100000"; `None` for that of the recipe's data.
        measure: True to time the run's own compiled steps here. False times small steps, if CPUs compute and their
            speed is not given.
        wanted: number of workers that all runs of the command together use to distil; 0 if this run is alone.

    Raises:
        ConfigError: the method cannot distil the recipe, the set does not fit into memory, `cluster` or `shape` cannot
            be read, or `measure` is True where the speed is given or the GPU is missing.
        DatasetError: the data cannot be read, or fitting ZCA takes more memory than is free.
        ClusterError: the precision needs a GPU, or another CPU.
    """
    method_of(config).check(config)
    if config.cluster.deterministic:
        fix_workspace()  # memory is asked of the GPU before steps are timed on it
    machine = machine_here(config) if cluster is None else parse_cluster(cluster, config.cluster.threads_per_worker)
    require_precision(config.cluster, machine.device == "GPU", elsewhere=cluster is not None)
    if measure and (machine.basis or (machine.device == "GPU" and not torch.cuda.is_available())):
        fact = "the speed is given" if machine.basis else "it has no GPU, which the workers compute on"
        remedy = "leave it out; tflops= or gflops= in --cluster gives a speed"
        raise ConfigError(f"--measure times steps on this machine, and {fact}", remedy=remedy)
    given = replace(parse_shape(shape), is_streamed=config.dataset.streamed) if shape else None
    data = given or data_shape(config.dataset, here=cluster is None)
    config = method_of(config).resolved(config.resolved(data.image[1:]))
    if cluster is None:
        fitting_cost(config.dataset, data).require_memory()
        sharing = min(workers_here(config.cluster), wanted or config.workers_per_set)
        found = Proposal(config, data, plans_of(config, data, sharing), machine)
    else:
        found = propose(config, data, machine)
    if measure or (machine.device == "core" and not machine.basis):
        return replace(found, machine=measured(found, quickly=not measure))
    return found


def propose(config: RunConfig, shape: DataShape, machine: Machine) -> Proposal:
    """Plan with the fewest shards whose distillation and validation take at most 5 % longer than the fastest plan's.

    Tried numbers of shards are powers of two and the largest possible number.

    Raises:
        ConfigError: no layout fits into memory, or the machine has fewer workers than the recipe needs.
    """
    rows, gpu, found = len(config.roles), machine.device == "GPU", list[Proposal]()
    apart = [name for name in ("backbones_apart", "auxiliaries_apart") if getattr(config.cluster, name)]
    unfit = ConfigError(
        f"{config.name} needs {rows} workers at the same time, and the cluster has {machine.workers}",
        "its networks are on workers of their own",
        f"use {' '.join(f'--set cluster.{name}=false' for name in apart)}, or describe a larger cluster",
    )
    layout: dict[str, Any] = {"workers": None, "device": "auto" if gpu else "cpu", "gpus_per_worker": int(gpu)}
    if size := machine.memory:
        layout["memory"] = str(size) if size % 2**30 else f"{size // 2**30}GiB"
    most = min(machine.workers // rows, shape.classes)
    if method_of(config).pieces(config, shape.classes):  # workers share the pieces, and no piece is divided
        most = min(most, 1)
    for shards in sorted({min(most, 2**power) for power in range(most.bit_length() + 1)} - {0}):
        own = laid_out(config, {**layout, "shards": shards})
        own = own.model_copy(update={"cluster": own.cluster.given_gpus(int(gpu))})
        try:
            found.append(Proposal(own, shape, plans_of(own, shape), machine, _replaced(config, own)))
        except ConfigError as failure:
            unfit = failure
    if not found:
        raise unfit
    clock = [each.clock["distillation"] + each.clock["validation"] for each in found]
    return next(each for each, seconds in zip(found, clock, strict=True) if seconds <= 1.05 * min(clock))


def _replaced(recipe: RunConfig, own: RunConfig) -> list[str]:
    """Settings of the recipe, such as "cluster.shards=4", that the layout in `own` replaces; defaults are left out."""
    usual, names = ClusterConfig(), ("shards", "workers", "gpus_per_worker")
    chosen = {name: (getattr(usual, name), getattr(own.cluster, name)) for name in names}
    asked = {name: getattr(recipe.cluster, name) for name in names}
    return [f"cluster.{name}={value:g}" for name, value in asked.items() if value not in chosen[name]]
