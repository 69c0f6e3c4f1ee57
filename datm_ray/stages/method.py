"""The seam between distillation and methods: what a method is given, and what it gives.

`stages/distill.py` resumes, iterates, validates and saves whatever the method. A method is a class with the members
of `Method`, constructed with a `Part`. `DistillWorker.method` is the class that is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from datm_ray.config import Role, RunConfig
from datm_ray.core.training import Heartbeat
from datm_ray.data.dataset import Dataset
from datm_ray.methods.state import MetaTerm, State
from datm_ray.runtime.mesh import Mesh
from datm_ray.stages.checkpoint import Rows
from datm_ray.stages.expert_networks import ExpertNetworks


@dataclass(frozen=True)
class Part:
    """One worker's part in the distillation of one set."""

    config: RunConfig
    dataset: Dataset
    store_uri: str
    mesh: Mesh
    """Workers that distil the set together."""
    device: torch.device
    sharing: int
    """Distilling workers that may be on this node at a time."""

    @cached_property
    def rows(self) -> Rows:
        """Rows of the synthetic set that the worker holds."""
        return Rows.of_shard(self.mesh.column, self.mesh.columns, self.dataset.classes, self.config.distill.ipc)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles of the rows of workers; empty if one row does everything."""
        return self.config.roles if self.mesh.rows > 1 else ()

    @property
    def role(self) -> Role:
        """Networks that this worker computes."""
        return self.roles[self.mesh.row] if self.roles else self.config.whole_role

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.dataset.channels, *self.dataset.size)


AState = TypeVar("AState", bound=State[Any], contravariant=True)


class Method(Protocol[AState]):
    """One way to change a synthetic set, as one worker computes it. Made by `Method(part)`."""

    @property
    def state(self) -> type[State[Any]]:
        """Class of the method's state, constructed with the first set and `config.distill`."""
        ...

    @property
    def experts(self) -> Sequence[ExpertNetworks]:
        """Trained networks of every backbone; the first backbone's choose and label the first images."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Messages to the user before the first iteration."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Settings and facts that decide how an iteration is rounded, such as precision; kept in checkpoints."""
        ...

    @property
    def preparation(self) -> str:
        """What `prepare` does, such as "compiling student steps"."""
        ...

    def prepare(self, heartbeat: Heartbeat) -> None:
        """Do once what takes long, such as compiling."""
        ...

    def calibrate(self, state: AState) -> Iterator[str]:
        """Choose what the recipe leaves open, once, before the first iteration of a new set. Gives messages.

        Raises:
            DatmError: the set would learn nothing.
        """
        ...

    def step(self, state: AState, meta: MetaTerm | None) -> None:
        """Run one iteration together with the other workers of the mesh."""
        ...

    def measured(self, state: AState) -> Mapping[str, float]:
        """Measurements of the last iteration. Keys are suffixes of metric names, such as `matching_loss`."""
        ...

    def shown(self, state: AState) -> Mapping[str, float]:
        """Values of the last iteration to show beside the progress bar."""
        ...

    def counts(self, state: AState) -> Mapping[str, int]:
        """Numbers that describe the finished distillation, such as skipped updates."""
        ...

    def images_seen(self) -> float:
        """Number of images that a network sees in one iteration, on average and over all workers."""
        ...

    def warnings(self, state: AState) -> Iterator[str]:
        """Messages after the last iteration, if the set learned less than the recipe says."""
        ...

    def close(self) -> None:
        """Release files and threads."""
        ...
