"""Dataset distillation at cluster scale: DATM and MetaDD on Ray, with an Arrow trajectory store.

>>> import datm_ray
>>> synthetic = datm_ray.run("digits-ipc10").synthetic  # or: datm_ray.load("runs/digits-ipc10/synthetic.arrow")
>>> loader = torch.utils.data.DataLoader(synthetic.dataset(), batch_size=128, shuffle=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datm_ray._version import __version__

if TYPE_CHECKING:
    from datm_ray.api import Result, distill, evaluate, init, plan, run, train_experts
    from datm_ray.artifact import Artifact, load
    from datm_ray.config import RunConfig
    from datm_ray.core.networks.architectures import SpatialNetwork
    from datm_ray.pipeline import publish
    from datm_ray.recipes import get_recipe
    from datm_ray.replay import ReplayedLabels
    from datm_ray.stages.methods.base import Method

__all__ = [
    "Artifact",
    "Method",
    "ReplayedLabels",
    "Result",
    "RunConfig",
    "SpatialNetwork",
    "__version__",
    "distill",
    "evaluate",
    "get_recipe",
    "init",
    "load",
    "plan",
    "publish",
    "run",
    "train_experts",
]

_HOME = {
    "Artifact": "datm_ray.artifact",
    "load": "datm_ray.artifact",
    "publish": "datm_ray.pipeline",
    "init": "datm_ray.api",
    "plan": "datm_ray.api",
    "run": "datm_ray.api",
    "train_experts": "datm_ray.api",
    "distill": "datm_ray.api",
    "evaluate": "datm_ray.api",
    "Result": "datm_ray.api",
    "Method": "datm_ray.stages.methods.base",
    "RunConfig": "datm_ray.config",
    "SpatialNetwork": "datm_ray.core.networks.architectures",
    "ReplayedLabels": "datm_ray.replay",
    "get_recipe": "datm_ray.recipes",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `datm-ray --help` must not wait for torch.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'datm_ray' has no attribute {name!r}")
