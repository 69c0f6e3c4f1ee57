"""Estimate of a run before it starts; for a described cluster, in the layout that suits the cluster best.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

from dataclasses import replace

from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.errors import ConfigError
from datm_ray.planning.duration import Proposal
from datm_ray.planning.fit import Layout, plans_of
from datm_ray.planning.machines import Machine, machine_here, parse_cluster, require_measurable
from datm_ray.planning.measure import measured
from datm_ray.planning.shape import DataShape, data_shape, fitting_cost, parse_shape
from datm_ray.runtime.executor import require_precision
from datm_ray.stages.registry import method_of


def plan_run(
    config: RunConfig,
    cluster: str | None = None,
    shape: str | None = None,
    *,
    measure: bool = False,
    workers_wanted: int = 0,
) -> Proposal:
    """Estimate memory, hours and storage of a run. Other arguments and errors: see `datm_ray.plan`.

    Args:
        workers_wanted: number of workers that all runs want for distilling at the same time; 0 for this run's number.

    Raises:
        DatasetError: the data cannot be read.
        ClusterError: the precision needs a GPU.
    """
    method_of(config).check(config)
    machine = machine_here(config) if cluster is None else parse_cluster(cluster, config.cluster.threads_per_worker)
    require_precision(config.cluster, machine.device == "GPU")
    if measure:
        require_measurable(machine)
    data = parse_shape(shape) if shape else data_shape(config.dataset, here=cluster is None)
    config = config.resolved(data.image[1:])
    if cluster is None:
        fitting_cost(config.dataset, data).require_memory()
        found = Proposal(config, data, plans_of(config, data, Layout.of(config, workers_wanted)), machine)
    else:
        found = propose(config, data, machine)
    if (machine.basis or machine.device == "GPU") and not measure:
        return found
    return replace(found, machine=measured(found, quickly=not measure))


def propose(config: RunConfig, shape: DataShape, machine: Machine) -> Proposal:
    """Proposal with the fewest shards that distils and validates at most 5 % longer than the fastest proposal.

    Numbers of shards are powers of two, and the largest possible number.

    Raises:
        ConfigError: no proposal fits into memory, or the machine has fewer workers than the recipe needs.
    """
    rows, gpu, found, failure = len(config.roles), machine.device == "GPU", [], None
    most = min(machine.workers // rows, shape.classes)
    if method_of(config).pieces(config, shape.classes):  # workers share the pieces, and no piece is divided
        most = min(most, 1)
    for shards in sorted({2**power for power in range(most.bit_length())} | {most} if most else set()):
        update = {"shards": shards, "workers": None, "device": "auto" if gpu else "cpu", "gpus_per_worker": float(gpu)}
        update |= {} if machine.memory is None else {"memory": str(machine.memory)}
        laid_out = config.model_copy(update={"cluster": config.cluster.model_copy(update=update)})
        try:
            found.append(Proposal(laid_out, shape, plans_of(laid_out, shape), machine))
        except ConfigError as unfit:
            failure = unfit
    if not found:
        raise failure or ConfigError(
            f"{config.name} needs {rows} workers at the same time, and the cluster has {machine.workers}",
            "its networks are on workers of their own",
            "lower cluster.backbones_apart, or describe a larger cluster",
        )
    clock = [each.clock["distillation"] + each.clock["validation"] for each in found]
    return next(each for each, seconds in zip(found, clock, strict=True) if seconds <= 1.05 * min(clock))


def not_followed(recipe: RunConfig, proposal: Proposal) -> list[str]:
    """Line on settings of the recipe's `cluster` section that the proposed layout replaces; empty if there are none."""
    ours, theirs, usual = recipe.cluster, proposal.config.cluster, ClusterConfig()
    ignored = [
        f"cluster.{name}={value:g}"
        for name in ("shards", "workers", "gpus_per_worker")
        if (value := getattr(ours, name)) not in (getattr(usual, name), getattr(theirs, name))
    ]
    return [f"  {'not followed':<16} {', '.join(ignored)} of the recipe: --cluster chooses these"] if ignored else []
