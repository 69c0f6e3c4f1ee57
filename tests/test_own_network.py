"""Tests networks of a user's own module, which recipes and `--arch` name as package.module:Builder."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datm_ray.config import NetworkConfig, RunConfig, networks_named, override, run_identity, short_names
from datm_ray.core.networks.parameters import flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.errors import ConfigError
from datm_ray.pipeline import Pipeline, preview
from datm_ray.planning.plan import plan_run
from datm_ray.store.trajectories import TrajectoryStore
from tests.conftest import CommandLine, assert_one_line, run_here, tiny_config

PAGE = Path(__file__).parents[1] / "docs/methods/own.md"
MORE = """
from torch import nn


def normed(spec):
    return nn.Sequential(nn.Conv2d(spec.channels, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(spec.classes))


def ten(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def flat(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, spec.classes))


class plain(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.conv, self.head = nn.Conv2d(spec.channels, 4, 3), nn.Linear(4, spec.classes)

    def forward(self, images):
        return self.head(self.conv(images).relu().mean((2, 3)))


def failing(spec):
    raise KeyError("no width")


def text(spec):
    return "network"


nothing = 1
"""
OWN = ("network.architecture=my_networks:small", "network.norm=none", "distill.initial_step_size=0.02")


@pytest.fixture(autouse=True)
def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the page's module importable, with more builders in another one."""
    (source,) = (each for each in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "def small" in each)
    (tmp_path / "my_networks.py").write_text(source)
    (tmp_path / "more_networks.py").write_text(MORE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_networks", "more_networks"):
        sys.modules.pop(name, None)


def test_the_documented_network_is_trained_matched_and_scored(tmp_path: Path) -> None:
    """The page's network is expert, student, MetaDD's first network and scored network; plans know its size."""
    meta = ("metadd={auxiliaries: ['my_networks:small'], experts: {count: 1, epochs: 1}}", "network.width=4")
    config = tiny_config(*meta, "evaluate.networks=['my_networks:small']", "evaluate.full=false", "evaluate.seeds=1")
    config = override(
        config, [*OWN, "metadd.auxiliaries.0.width=8", "distill.iterations=2", "distill.validate_every=0"]
    )
    pipeline = run_here(tmp_path / "runs", config)
    assert "my_networks:small" in pipeline.table()
    keys = TrajectoryStore(pipeline.store_uri).groups()
    assert {key.architecture for key in keys} == {"my_networks-small"}
    assert len(keys) == 2
    scored = tmp_path / "runs/tiny/evaluation"
    folders = [each.name.rpartition("-")[0] for each in scored.glob("trained-*/*") if each.is_dir()]
    assert folders == ["my_networks-small"] * 2
    again = preview.remaining_lines(Pipeline([config], str(tmp_path / "runs")).runs)
    assert again[0] == "0 experts to train"
    assert plan_run(config, "cpus=2,memory=8GiB").stages["experts"][0] > 0


def test_metadd_takes_networks_whose_maps_can_be_found(tmp_path: Path) -> None:
    """A network that is no `SpatialNetwork`, as torchvision's, is an auxiliary of MetaDD."""
    config = tiny_config("metadd={auxiliaries: ['more_networks:plain'], experts: {count: 1, epochs: 1}}")
    config = override(
        config, [*OWN, "evaluate.seeds=1", "evaluate.full=false", "distill.iterations=1", "distill.validate_every=0"]
    )
    run_here(tmp_path / "runs", config)
    assert (tmp_path / "runs/tiny/maps.arrow").exists()


def test_a_network_of_a_users_is_drawn_from_its_seed_alone() -> None:
    """Equal seeds give equal parameters, also of lazy layers, which have their shapes; other seeds give others."""
    for name in ("my_networks:small", "more_networks:normed"):
        spec = NetworkConfig(architecture=name, width=4).for_images(3, (8, 8), 5)
        assert torch.equal(flatten(build_network(spec, 1)), flatten(build_network(spec, 1)))
        assert not torch.equal(flatten(build_network(spec, 1)), flatten(build_network(spec, 2)))
        assert build_network(spec, 1)(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
        assert build_network(spec, 1).training


def test_a_colon_begins_a_width_or_a_builder() -> None:
    """`--arch` tells NAME:WIDTH from package.module:Builder, with a width or not, and takes the recipe's networks."""
    names = ["resnet18:32", "my_networks:small", "my_networks:small:32", "vgg11", "a.b:C"]
    found = [(each.architecture, each.width) for each in networks_named(RunConfig(), names)]
    small = "my_networks:small"
    assert found == [("resnet18", 32), (small, 128), (small, 32), ("vgg11", 128), ("a.b:C", 128)]
    config = override(RunConfig(), [*OWN, "network.width=4"])
    assert [each.width for each in networks_named(config, [small])] == [4]
    both = list(networks_named(config, [small, f"{small}:8"]))
    assert short_names(both) == [f"{small} (width 4)", f"{small} (width 8)"]
    for wrong in ("resnet18:0", "resnet18:-3", "resnet18:", "my_networks:small:1.5"):
        with pytest.raises(ConfigError, match="no number after the colon"):
            networks_named(RunConfig(), [wrong])


def test_identity_has_the_name_of_the_builder() -> None:
    """Two builders are two runs; the identity holds the name as the recipe gives it."""
    one, other = (override(RunConfig(), [f"network.architecture={name}"]) for name in ("a:B", "a:C"))
    assert run_identity(one)["network"]["architecture"] == "a:B"
    assert run_identity(one) != run_identity(other)


WRONG = {
    "network.architecture=no_module:Net": "network.architecture 'no_module:Net' cannot be imported: No module named",
    "network.architecture=my_networks:absent": "the class or function has another name",
    "network.architecture=more_networks:nothing": "'more_networks:nothing' is no builder. It is a int",
    "network.architecture=more_networks:failing": "cannot be built for images of 1x8x8 in 10 classes: 'no width'",
    "network.architecture=more_networks:text": "'more_networks:text' returns a str. Return a torch.nn.Module",
    "network.architecture=more_networks:ten": "gives [2, 7] for images [2, 1, 8, 8]. Logits [2, 10] are expected",
    "network.architecture=more_networks:normed": "has batch normalisation, and network.norm is 'instance'",
    "network.architecture=more_networks:flat network.norm=batch": "has no batch normalisation, and network.norm",
    "network.architecture=more_networks:flat metadd={auxiliaries: [lenet]}": "has no feature maps",
    "backbones=[{network: 'more_networks:ten'}]": "backbones.0.network.architecture 'more_networks:ten' gives [2, 7]",
    "evaluate.networks=['resnet18:wide']": "what follows the colon is no width. Write NAME:WIDTH, as resnet18:32",
    "network.architecture=resnet": "or give package.module:Builder of your own",
}


@pytest.mark.parametrize("settings", WRONG)
def test_a_network_that_cannot_be_used_is_one_line(datm_ray: CommandLine, tmp_path: Path, settings: str) -> None:
    """What is wrong with a builder or its network is shown before anything starts."""
    given = [word for each in re.split(r" (?=[a-z]+[.=])", settings) for word in ("--set", each)]
    assert_one_line(
        datm_ray("run", "digits-smoke", "--executor", "serial", "--out", str(tmp_path / "out"), *given), WRONG[settings]
    )
    assert not (tmp_path / "out").exists()
