"""Tests `cluster.deterministic`: no operation that a GPU would refuse, and the process's settings are restored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from datm_ray.artifact import load
from datm_ray.config import ClusterConfig, NetworkSpec, run_identity
from datm_ray.core.networks.registry import build_network, network_names
from datm_ray.errors import ClusterError
from datm_ray.pipeline import Pipeline
from datm_ray.pipeline.runs import Runs
from datm_ray.planning import plan as planning
from datm_ray.runtime.executor import Event, Finished, SerialExecutor, Task
from datm_ray.runtime.machine.devices import prepare_device
from tests.conftest import run_here, tiny_config

EVERY = "color_crop_cutout_flip_scale_rotate_resized+flip"
AUGMENTED = (
    *(f"experts.augmentation={EVERY}", f"distill.augmentation={EVERY}", "distill.student_steps=8"),
    *("experts.count=1", "experts.epochs=3", "distill.iterations=2", "distill.start_epochs=[0, 2]"),
    *("distill.validate_every=2", "evaluate.seeds=1", "evaluate.epochs=2"),
)
PIECES = ("network.norm=batch", "experts.keep_epochs=2", "experts.test_every=0", "select.pool=8", "select.crops=3")
METHODS = {
    "mtt with a prior and a teacher's labels": (
        *("method=mtt", "prior={epochs: 1, width: 4}", "evaluate.labels=stored", "evaluate.cutmix=1"),
    ),
    "dm": ("method=dm", "distill.ipc=2", "distill.real_batch=16", "distill.initial_step_size=0.03"),
    "sre2l": ("method=sre2l", "distill.ipc=2", "distill.initial_step_size=0.03", *PIECES),
    "select": ("method=select", "distill.ipc=2", "distill.initial_step_size=0.03", *PIECES),
    "MetaDD": (
        "metadd={auxiliaries: [{architecture: lenet}, {architecture: resnet18, width: 2, norm: batch}],"
        " experts: {count: 1, epochs: 1}}",
    ),
}
"""What a run has besides `AUGMENTED` -> its changes."""
REFUSED = {
    "grid_sampler_2d_backward",
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "reflection_pad2d_backward",
    "upsample_bilinear2d_backward",
    "nll_loss2d_forward",
    "put_",
    "histc",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}
"""Operations for which torch has no fixed order of sums on a GPU, so that it raises an error there, not on a CPU."""
REPLACED = {"upsample_bilinear2d_backward"}
"""Operations in `REFUSED` that torch replaces by deterministic ones on a GPU."""


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


class Recorder(TorchDispatchMode):
    """Records names of operations, each with whether deterministic algorithms were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record and run an operation."""
        name = func.overloadpacket.__name__
        self.names.add((name, torch.are_deterministic_algorithms_enabled()))
        return func(*args, **(kwargs or {}))

    @property
    def refused(self) -> set[str]:
        """Operations that would fail on a GPU."""
        return REFUSED & {name for name, _ in self.names}


def run(config: Any, out: Path) -> Recorder:
    with Recorder() as recorder:
        run_here(out, config)
    return recorder


def test_a_whole_run_uses_no_operation_that_a_gpu_refuses(tmp_path: Path) -> None:
    """A deterministic run of all stages works, restores the process's setting, and differs by rounding alone."""
    usual = run(tiny_config(*AUGMENTED), tmp_path / "usual")
    assert usual.refused == {"grid_sampler_2d_backward"}
    fixed = run(tiny_config(*AUGMENTED, "cluster.deterministic=true"), tmp_path / "fixed")
    assert {"convolution_backward", "scatter_add"} <= {name for name, asked in fixed.names if asked}
    assert not fixed.refused
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    one, other = (load(str(tmp_path / name / "tiny" / "synthetic.arrow")) for name in ("usual", "fixed"))
    torch.testing.assert_close(other.images, one.images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.soft_labels, one.soft_labels, rtol=1e-4, atol=1e-5)
    assert other.recipe["cluster"] == {"deterministic": True}


@pytest.mark.parametrize("kind", METHODS)
def test_no_method_needs_an_operation_that_a_gpu_refuses(kind: str, tmp_path: Path) -> None:
    """All stages of every method, with MetaDD, a prior or a teacher's labels, compute what a GPU does not refuse."""
    fixed = run(tiny_config(*AUGMENTED, *METHODS[kind], "cluster.deterministic=true"), tmp_path)
    assert {True} == {asked for name, asked in fixed.names if name == "convolution_backward"}
    assert fixed.refused <= REPLACED
    assert ("upsample_bilinear2d_backward" in fixed.refused) == (kind == "MetaDD")


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("name", network_names())
def test_no_network_needs_an_operation_that_a_gpu_refuses(name: str, pooling: Any) -> None:
    """Training steps of every architecture work with deterministic algorithms."""
    prepare_device(ClusterConfig(device="cpu", deterministic=True))
    spec = NetworkSpec(architecture=name, channels=3, size=(32, 32), classes=4, width=8, depth=2, pooling=pooling)
    network, images = build_network(spec, 0), torch.randn(2, 3, 32, 32)
    with Recorder() as recorder:
        loss = torch.nn.functional.cross_entropy(network(images.requires_grad_()), torch.zeros(2, dtype=torch.int64))
        torch.autograd.grad(loss, [images, *network.parameters()])
    assert recorder.names
    assert not recorder.refused


def test_a_worker_asks_for_determinism_only_if_the_recipe_does() -> None:
    """Workers set torch and cuBLAS to fixed orders if asked to, keep a user's workspace, and else change nothing."""
    prepare_device(ClusterConfig(device="cpu"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    executor = SerialExecutor(ClusterConfig(device="cpu", deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    executor.close()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # as a user's own program may
    executor = SerialExecutor(ClusterConfig(device="cpu"))
    executor.close()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


class Asked:
    """A worker that returns its process's settings."""

    def __init__(self, cluster: ClusterConfig) -> None:
        prepare_device(cluster)

    def work(self) -> Iterator[Event]:
        """Return whether algorithms are deterministic, and cuBLAS's workspace."""
        yield Finished((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_ray_have_the_settings_and_the_driver_has_not(ray_cluster: Any) -> None:
    """Determinism is set in the processes of Ray's workers alone."""
    from datm_ray.runtime.ray.executor import RayExecutor

    cluster = tiny_config("cluster.deterministic=true").cluster
    executor = RayExecutor(cluster)
    events = [event for _, event in executor.run(Asked, (cluster,), "work", [Task("asked", ())])]
    executor.close()
    assert [event.result for event in events if isinstance(event, Finished)] == [(True, ":4096:8")]
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_determinism_is_part_of_the_identity_only_if_it_is_on() -> None:
    """Runs made before the key existed keep their identity; a deterministic run is another run."""
    plain, fixed = tiny_config(), tiny_config("cluster.deterministic=true")
    assert "cluster" not in run_identity(plain)
    assert run_identity(fixed) == run_identity(plain) | {"cluster": {"deterministic": True}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that torch reports, and that this process has used."""
    for name, value in (("is_available", True), ("is_initialized", True), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.usefixtures("gpu")
def test_determinism_asked_for_too_late_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has used its GPU cannot start a deterministic run on it, unless its workspace was fixed before."""
    fixed = ClusterConfig(deterministic=True)
    with pytest.raises(ClusterError, match="used its GPU before it started the run") as refused:
        prepare_device(fixed)
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in refused.value.remedy
    assert not torch.are_deterministic_algorithms_enabled()
    assert prepare_device(ClusterConfig()).type == "cuda"
    assert prepare_device(ClusterConfig(device="cpu", deterministic=True)).type == "cpu"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert prepare_device(fixed).type == "cuda"
    assert torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_fixes_the_workspace_before_anything_uses_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks, plans and the fit of zca may use the GPU before a worker does, so the workspace is fixed before them."""
    first = [(Runs, "__init__"), (planning, "machine_here")]
    for owner, name in first:
        monkeypatch.setattr(owner, name, _stopping)
    config = tiny_config("cluster.deterministic=true")
    for call in (lambda: Pipeline([config], str(tmp_path), alone=True), lambda: planning.plan_run(config)):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        with pytest.raises(StopIteration, match=":4096:8"):
            call()


def _stopping(*_: Any, **__: Any) -> None:
    raise StopIteration(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
