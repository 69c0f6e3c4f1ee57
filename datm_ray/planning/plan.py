"""What a run takes, before anything starts: checks of the recipe, memory, time and storage in one value."""

from __future__ import annotations

from dataclasses import replace

from datm_ray.config import RunConfig
from datm_ray.planning.duration import Proposal, propose
from datm_ray.planning.fit import Layout, data_shape, fitting_cost, parse_shape, plans_of
from datm_ray.planning.machines import machine_here, parse_cluster, require_measurable
from datm_ray.planning.measure import measured
from datm_ray.runtime.executor import require_precision


def plan_run(
    config: RunConfig,
    cluster: str | None = None,
    shape: str | None = None,
    *,
    measure: bool = False,
    workers_wanted: int = 0,
) -> Proposal:
    """Estimate memory, hours and storage of a run.

    Args:
        config: the run.
        cluster: description of a cluster to suggest a layout for, see `parse_cluster`; None plans for this machine.
        shape: shape of data that is not here, see `parse_shape`; None reads the run's data if its source is not known.
        measure: True to time real steps on this machine as the run will compute them. False times small uncompiled
            ones if workers compute on CPUs of no given speed, which takes seconds.
        workers_wanted: distilling workers of all runs at the same time; 0 for those of this run.

    Raises:
        ConfigError: the set does not fit into memory, or a description cannot be read.
        DatasetError: the data cannot be read.
        ClusterError: the precision needs a GPU.
    """
    config.require_matchable()
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
