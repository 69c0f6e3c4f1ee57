"""Tests configurations: strictness, one clear line for each error, and the identity of runs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from datm_ray.config import (
    PUBLISHED_AUGMENTATION,
    DatasetConfig,
    NetworkConfig,
    RunConfig,
    StartEpochs,
    expert_fingerprint,
    load_recipe_of_run,
    override,
    parse_config,
    recipe_of_set,
    run_identity,
    scored_on,
    scoring_identity,
    short_names,
    stable_hash,
    to_yaml,
    unread_keys,
    unread_values,
)
from datm_ray.config.files import keys_given
from datm_ray.config.identity import SCORING_KEYS
from datm_ray.config.schema import fields_at
from datm_ray.config.sections import READ_OF_DISTILL, SELDOM, UNREAD_BY_MATCHING, DistillConfig, SelectConfig
from datm_ray.errors import ConfigError
from datm_ray.pipeline.checks import unequal_keys
from datm_ray.recipes import get_recipe, recipe_names
from datm_ray.stages.methods.registry import role_of, teacher_of, trained_networks
from tests.conftest import load_config_text


def refusal(text: str | bytes, folder: Path) -> str:
    """Message with which a file is refused."""
    path = folder / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        get_recipe(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distil: {ipc: 3}", "unknown key 'distil'. Did you mean 'distill'?"),
        ("distill: {icp: 3}", "unknown key 'distill.icp'. Did you mean 'distill.ipc'?"),
        ("experts: {zzzz: 3}", "unknown key 'experts.zzzz'. Known keys: count, epochs, batch_size"),
        ("1: 2", "keys should be strings"),
        ("distill: {ipc: '10'}", "distill.ipc is '10': input should be a valid integer"),
        ("distill: {ipc: 10.0}", "distill.ipc is 10.0: input should be a valid integer"),
        ("seed: true", "seed is True: input should be a valid integer"),
        ("experts: {learning_rate: fast}", "experts.learning_rate is 'fast': input should be a valid number"),
        ("experts: {learning_rate: yes}", "experts.learning_rate is True: input should be a valid number"),
        ("distill:", "distill is None: input should be a section of keys and values"),
        ("distill: [1]", "distill is [1]: input should be a section of keys and values"),
        (
            "dataset: {normalisation: ZCA}",
            "dataset.normalisation is 'ZCA': input should be 'auto', 'zca' or",
        ),
        ("dataset: {mean: [0.5]}", "dataset.mean and dataset.std need one number per channel each"),
        ("dataset: {mean: [0.5], std: [1, 1]}", "need one number per channel each"),
        ("dataset: {mean: [0.5], std: [0]}", "dataset.std.0 is 0: input should be greater than 0"),
        ("dataset: {normalisation: zca, mean: [0], std: [1]}", "set dataset.normalisation=standard"),
        ("name: my run", "name is 'my run': a name has letters, digits, '.', '_' and '-'"),
        ("name: ../x", "name is '../x'"),
        ("seed: -1", "seed is -1: input should be greater than or equal to 0"),
        ("seed: 9223372036854775808", "seed is 9223372036854775808: input should be less than"),
        ("distill: {ipc: 0}", "distill.ipc is 0: input should be greater than or equal to 1"),
        ("experts: {learning_rate: 0}", "experts.learning_rate is 0"),
        ("experts: {momentum: 1}", "experts.momentum is 1"),
        ("dataset: {validation: 1.0}", "dataset.validation is 1.0"),
        ("experts: {learning_rate: .nan}", "experts.learning_rate is nan"),
        ("experts: {momentum: .nan}", "experts.momentum is nan"),
        ("dataset: {validation: .nan}", "dataset.validation is nan"),
        ("cluster: {gpus_per_worker: .inf}", "cluster.gpus_per_worker is inf"),
        (
            "distill: {start_epochs: [10, 10]}",
            "distill.start_epochs needs first < bound <= final_bound, but has 10, 10",
        ),
        ("distill: {start_epochs: [10]}", "distill.start_epochs is [10]; give two epochs, such as [5, 30]"),
        ("distill: {start_epochs: 10}", "distill.start_epochs is 10; give two epochs, such as [5, 30]"),
        ("distill: {start_epochs: [early, 10]}", "distill.start_epochs.first is 'early': input should be a valid int"),
        ("distill: {start_epochs: {first: 10}}", "distill.start_epochs.bound is missing"),
        (
            "distill: {start_epochs: {bound: 21, final_bound: 20}}",
            "but has 0, 21 and 20; bounds are exclusive",
        ),
        (
            "distill: {start_epochs: {bound: 1, final_bound: 2}}",
            "expand_iterations is 0, so the bound cannot grow from",
        ),
        ("distill: {start_bound: 10}", "key 'distill.start_bound'. Its new name is 'distill.start_epochs.bound'."),
        (
            "experts: {epochs: 20}",
            "start_epochs up to 19 with expert_epochs 2 needs epoch 21, but experts.epochs is 20",
        ),
        ("a: [1", "not valid YAML at line 1"),
        ("seed: 1\nname:\tx: y", "not valid YAML at line 2"),
        ("seed: 1\nseed: 2", "not valid YAML at line 2: key 'seed' is repeated"),
        (
            "distill:\n  ipc: 1\nseed: 1\ndistill:\n  threshold: 2.0",
            "not valid YAML at line 4: key 'distill' is repeated",
        ),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("seed: !!int many", "not valid YAML"),
        ("name: !!timestamp soon", "not valid YAML"),
        ("seed: *x", "not valid YAML"),
        ("network: {width: 1e+400}", "network.width is inf"),
        ("network: {width: " + "1:" * 2_000 + "1.5}", "not valid YAML"),
        ("seed: !!int ''", "not valid YAML"),
        ("#" * 2**17, "is too long for a recipe"),
        ("[" * 5000, "not valid YAML"),
        ("- 1\n- 2", "holds no configuration"),
        ("just text", "holds no configuration"),
        ("", "holds no configuration"),
        (b"\x00\x01\x02", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n", "is not a text file. Give a recipe's name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_file_is_refused_in_one_line(text: str | bytes, expected: str, tmp_path: Path) -> None:
    """A bad file is one line of error with the file, the key or place, and what would be right."""
    assert expected in refusal(text, tmp_path)


def test_latest_start_that_still_has_a_target_is_accepted() -> None:
    """Start 18 with a span of 2 and 20 epochs is accepted; start 19 is not."""
    values: dict[str, Any] = {"experts": {"epochs": 20}, "distill": {"start_epochs": [0, 19]}}
    parse_config(values, "test")
    values["distill"] = {"start_epochs": [0, 20]}
    with pytest.raises(ConfigError, match="needs epoch 21"):
        parse_config(values, "test")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    """A missing file or a folder is one line of error with the operating system's reason."""
    with pytest.raises(ConfigError, match=r"^cannot read .*none\.yaml: No such file or directory\. Check the path\.$"):
        get_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        get_recipe(str(tmp_path))


def test_file_gives_the_run_its_name(tmp_path: Path) -> None:
    """A file without a name gives the run its own name."""
    (tmp_path / "mine.yaml").write_text("seed: 3")
    (tmp_path / "other.yaml").write_text("name: chosen")
    assert get_recipe(str(tmp_path / "mine.yaml")) == RunConfig(name="mine", seed=3)
    assert get_recipe(str(tmp_path / "other.yaml")) == RunConfig(name="chosen")


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.e-5", "1.0e-05", "0.1e-4", "+1e-5", "10e-6", "0.00001"])
def test_numbers_are_written_as_people_do(number: str) -> None:
    """1e-5 is a number in files and overrides, though YAML 1.1 reads it as text."""
    from_file = load_config_text(f"distill: {{learning_rate_step_size: {number}}}", "test")
    assert from_file.distill.learning_rate_step_size == pytest.approx(1e-5)
    assert override(from_file, [f"distill.learning_rate_step_size={number}"]) == from_file


def test_dates_and_quoted_numbers_are_text() -> None:
    """Dates and quoted numbers are text, so that a run's name can be a day."""
    assert load_config_text("name: 2024-11-20", "test").name == "2024-11-20"
    assert load_config_text("name: '1e5'", "test").name == "1e5"


def test_whole_numbers_are_numbers() -> None:
    """100 and 100.0 are one learning rate, also in the identity."""
    whole, point = (load_config_text(f"distill: {{learning_rate_images: {x}}}", "test") for x in ("100", "100.0"))
    assert stable_hash(run_identity(whole)) == stable_hash(run_identity(point))


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_survives_yaml(name: str) -> None:
    """The output of `recipe show` is read back as an equal configuration."""
    recipe = get_recipe(name)
    assert load_config_text(to_yaml(recipe), name) == recipe


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_none_is_null_where_there_may_be_nothing(text: str) -> None:
    """none is null for an optional value, and the word where it is a word."""
    config = override(RunConfig(), [f"dataset.resize={text}", f"cluster.memory={text}", f"metadd={text}"])
    assert (config.dataset.resize, config.cluster.memory, config.metadd) == (None, None, None)
    assert override(RunConfig(), ["cluster.log_to=none"]).cluster.log_to == "none"


@pytest.mark.parametrize("text", ["1e5", "2024-11-20", "007", "null", "yes", "1", ".5e3"])
def test_text_that_looks_like_something_else_survives_yaml(text: str) -> None:
    """Names and paths stay text in YAML, with `#`, quotes and blanks."""
    recipe = override(get_recipe("digits-ipc1"), [f"dataset.path='a # {text}: \"b\" ...'"])
    recipe = recipe.model_copy(update={"name": text.strip(".")})
    recipe = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"source": text})})
    assert load_config_text(to_yaml(recipe), "test") == recipe


def test_yaml_comments_on_every_field_within_100_columns() -> None:
    """Every field and section in YAML has a comment behind or above it, within 100 columns.

    A section's comment is the first line of its docstring.
    """
    changes = "evaluate.networks=[resnet18, lenet]", "backbones=[{network: vgg11}, {network: {width: 8}}]"
    config = override(get_recipe("digits16-metadd-ipc1"), changes)
    lines = [line for line in to_yaml(config).splitlines() if line]
    elements = [line for line in lines if line.strip().startswith("- ") or line.startswith("  weight:")]
    assert len(elements) == 2 + 2 + 2 * 2
    lines = [line for line in lines if line not in elements]
    for above, line in itertools.pairwise(["", *lines]):
        assert "# " in line or above.strip().startswith("# "), line
    values = config.model_dump()
    values["distill"]["start_epochs"] = None
    sections = [value for value in [*values.values(), values["metadd"]["experts"]] if isinstance(value, dict)]
    keys = [line for line in lines if not line.strip().startswith("# ")]
    assert len(keys) == len(RunConfig.model_fields) + sum(map(len, sections))
    assert max(map(len, [*lines, *elements])) <= 100
    assert f"network:  # {(NetworkConfig.__doc__ or '').splitlines()[0]}" in lines
    assert load_config_text("\n".join(to_yaml(config).splitlines()), "test") == config


def test_usual_keys_come_first() -> None:
    """Keys that few recipes change come last in their section, below a comment line."""
    assert all(set(fields.split()) <= fields_at([section]).keys() for section, fields in SELDOM.items())
    for text in to_yaml(get_recipe("digits16-metadd-ipc1")).split("\n\n")[1:]:
        usual, marker, seldom = text.partition("# seldom needed:\n")
        section = usual.split("\n  ")[0].splitlines()[-1].strip().partition(":")[0]
        assert marker or section == "metadd"  # MetaDD's own keys follow those of metadd.experts
        for part, expected in ((usual, False), (seldom.partition("  variance:")[0], True)):
            keys = re.findall(r"^ +(\w+): ", part, re.MULTILINE)
            listed = SELDOM[section].split()
            assert {key in listed for key in keys if key in fields_at([section])} <= {expected}, part


def test_shorter_recipes_hold_what_differs_from_their_base(tmp_path: Path) -> None:
    """A recipe with a base merges sections and replaces lists, the range of epochs and the name."""
    birds = "base: digits16-metadd-ipc1\ndataset: {path: birds}\ndistill: {ipc: 3, start_epochs: {bound: 4}}\n"
    (tmp_path / "birds.yaml").write_text(birds + "metadd: {auxiliaries: [mlp], experts: {epochs: 30}}\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "owls.yaml").write_text("base: ../birds.yaml\nseed: 5\nmetadd: null\nnetwork: lenet\n")
    changes = ["name=birds", "dataset.path=birds", "distill.ipc=3", "distill.start_epochs=[0,4]"]
    changes += ["metadd.auxiliaries=[{architecture: mlp}]", "metadd.experts.epochs=30"]
    found = get_recipe(str(tmp_path / "birds.yaml"))
    assert found == override(get_recipe("digits16-metadd-ipc1"), changes)
    owls = get_recipe(str(tmp_path / "more" / "owls.yaml"))
    assert owls == override(found, ["name=owls", "seed=5", "metadd=null", "network=lenet"])
    assert load_config_text(to_yaml(owls), "test") == owls
    (tmp_path / "early.yaml").write_text("base: cifar10-ipc10\ndistill: {start_epochs: {bound: 4}}\n")
    expected = get_recipe("cifar10-ipc10").distill.start_epochs.model_copy(update={"bound": 4})
    assert get_recipe(str(tmp_path / "early.yaml")).distill.start_epochs == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: digits-icp1", ": base: unknown recipe 'digits-icp1'. Did you mean 'digits-ipc1'?"),
        ("base: none.yaml", "base: cannot read {folder}/none.yaml: No such file or directory. Check the path."),
        ("base: ./my.yaml", ": base: {folder}/./my.yaml is a base of itself. Remove one `base:` of these files."),
        ("base: other.yaml", ": base: {folder}/other.yaml: base: {folder}/my.yaml is a base of itself. Remove one"),
        ("base: wrong.yaml", ": base: {folder}/wrong.yaml: unknown key 'sed'. Did you mean 'seed'?"),
        ("base: [digits-ipc1]", ": base is ['digits-ipc1']. Give a packaged recipe's name or a YAML file."),
        ("base:", ": base is None. Give a packaged recipe's name"),
        ("base: digits-ipc1\nsed: 3", ": unknown key 'sed'. Did you mean 'seed'?"),
        ("base: digits-ipc1\ndistill: 3", ": distill is 3: input should be a section"),
    ],
)
def test_base_that_cannot_be_found_is_refused_in_one_line(text: str, expected: str, tmp_path: Path) -> None:
    """A missing base is one line of error that names each file on the way."""
    (tmp_path / "other.yaml").write_text("base: my.yaml")
    (tmp_path / "wrong.yaml").write_text("sed: 3")
    assert expected.format(folder=tmp_path) in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        (["evaluate.networks=[resnet18,vgg11]"], "evaluate.networks.1.architecture", "vgg11"),
        (["evaluate.networks=[{architecture: resnet18, width: 16}, mlp]"], "evaluate.networks.0.width", 16),
        (["evaluate.networks=[mlp, lenet]", "evaluate.networks.1=vgg11"], "evaluate.networks.1.architecture", "vgg11"),
        (["metadd.auxiliaries.1.width=64"], "metadd.auxiliaries.1.width", 64),
        (["metadd.auxiliaries.1.architecture=lenet"], "metadd.auxiliaries.0.architecture", "resnet18"),
        (["backbones=[{network: lenet}]", "backbones.0.weight=2"], "backbones.0.weight", 2.0),
        (["backbones=[{network: lenet}]", "backbones.0.network=vgg11"], "backbones.0.network.architecture", "vgg11"),
        (["network=lenet"], "network.width", 128),
    ],
    ids=lambda value: str(value)[:60],
)
def test_lists_and_sections_can_be_overridden(changes: list[str], key: str, expected: object) -> None:
    """An override can set a list, an element, or a value in one; a name stands for a network."""
    config = override(get_recipe("digits16-metadd-ipc1"), changes)
    found: Any = config.model_dump()
    for part in key.split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == expected
    (size,) = {len(networks.auxiliaries) for networks in (config.metadd,) if networks}
    assert size == 2


def test_overrides_replace_single_values() -> None:
    """Overrides are YAML, the last one counts, and all other values stay."""
    base = get_recipe("cifar10-ipc10")
    changed = override(base, ["distill.ipc=3", " seed =7", "dataset.path=", "cluster.compile=false", "distill.ipc=4"])
    assert (changed.distill.ipc, changed.seed, changed.dataset.path, changed.cluster.compile) == (4, 7, None, False)
    restored = override(changed, ["distill.ipc=10", "seed=0", "cluster.compile=true"])
    assert restored == base
    assert override(base, []) == base


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("distill.ipc", "'distill.ipc' is not an assignment. Write --set section.field=value"),
        ("=3", "is not an assignment"),
        ("distill.icp=3", "Did you mean 'distill.ipc'?"),
        ("nowhere.ipc=3", "unknown key 'nowhere'"),
        (".=3", "unknown key ''"),
        ("seed.x=3", "'seed' is not a section. Known keys: name, seed, dataset"),
        ("seed.0=3", "'seed' is not a section"),
        ("backbones.0.weight=2", "backbones has no element '0'. It is a list of length 0, counted from 0. Give"),
        (
            "evaluate.networks.first=mlp",
            "evaluate.networks has no element 'first'. It is a list of length 0, counted from 0",
        ),
        ("evaluate.networks.-1.width=3", "evaluate.networks has no element '-1'"),
        ("evaluate.networks=mlp", "evaluate.networks is 'mlp': input should be a list: [...]"),
        ("evaluate.networks=[mlp, 3]", "evaluate.networks.1 is 3: input should be a section of keys and values"),
        ("backbones=[{weight: 2}]", "backbones.0.network is missing"),
        ("backbones=[{netwrok: mlp}]", "Did you mean 'backbones.0.network'?"),
        ("distill.ipc=many", "distill.ipc is 'many': input should be a valid integer"),
        ("distill.threshold=nan", "distill.threshold is 'nan'"),
        ("distill.ipc=[1", "not valid YAML"),
        ("seed=!!int x", "not valid YAML"),
        ("distill=3", "distill is 3: input should be a section"),
        ("experts.epochs=5", "but experts.epochs is 5"),
    ],
)
def test_bad_override_is_refused_in_one_line(assignment: str, expected: str) -> None:
    """A bad override is one line of error with its assignment or key."""
    with pytest.raises(ConfigError) as caught:
        override(get_recipe("cifar10-ipc10"), [assignment])
    assert expected in str(caught.value)
    assert str(caught.value).startswith("--set")
    assert "\n" not in str(caught.value)


def test_machines_can_be_chosen_without_changing_results() -> None:
    """Resources, labels, GPU model and a shape for light workers survive YAML and change no identity."""
    base = get_recipe("digits-ipc1")
    assignments = ["cluster.resources={small: 1, zero: 0}", "cluster.labels.zone=!a", "cluster.accelerator_type=A100"]
    assignments += ["cluster.light.gpus_per_worker=0.25", "cluster.light.labels={ray.io/market: 'in(a, b)'}"]
    changed = override(base, assignments)
    assert changed.cluster.resources == {"small": 1.0, "zero": 0.0}
    assert changed.cluster.labels == {"zone": "!a"}
    assert load_config_text(to_yaml(changed), "test") == changed
    assert run_identity(changed) == run_identity(base)
    light = changed.cluster.shaped(light=True)
    assert (light.gpus_per_worker, light.labels, light.accelerator_type) == (0.25, {"ray.io/market": "in(a, b)"}, None)
    assert (light.shards, light.compile) == (changed.cluster.shards, changed.cluster.compile)
    assert changed.cluster.shaped(light=False) is changed.cluster
    assert base.cluster.shaped(light=True) is base.cluster
    wrong = {
        "resources.x=-1": "cluster.resources.x is -1: input should be greater than or equal to 0",
        "resources.x=1.5": "cluster.resources.x is 1.5: above 1 it must be a whole number",
        "gpus_per_worker=2": "cluster.gpus_per_worker is 2: a worker computes on one GPU; cluster.shards divides",
        "light.gpus_per_worker=1.5": "cluster.light.gpus_per_worker is 1.5: a worker computes on one GPU",
        "resources={CPU: 1}": "cluster.resources.CPU is 'CPU': it is Ray's own; use threads_per_worker",
        "labels={-x: a}": "cluster.labels.-x is '-x': it must be a label's name",
        "labels.x=in()": "cluster.labels.x is 'in()': it must be a label's value, !value, in(a,b)",
        "light.labels.x=": "cluster.light.labels.x is None: input should be a valid string",
        "accelerator_type=A 100": "cluster.accelerator_type is 'A 100': it must be a name of Ray's",
        "light={gpus: 1}": "unknown key 'cluster.light.gpus'",
        "light.threads_per_worker=0": "cluster.light.threads_per_worker is 0: input should be greater",
    }
    for assignment, expected in wrong.items():
        with pytest.raises(ConfigError) as caught:
            override(base, [f"cluster.{assignment}"])
        assert str(caught.value).startswith(f"--set: {expected}"), assignment


def test_configuration_is_frozen() -> None:
    """A configuration cannot be changed."""
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().distill.ipc = 1  # type: ignore[misc]


def test_identity_leaves_out_where_things_are_and_how_many_are_scored() -> None:
    """The identity ignores places, workers and numbers of scores, and includes all other values."""
    config = RunConfig()
    elsewhere = override(config, ["cluster.workers=9", "cluster.device=cpu", "cluster.gpus_per_worker=0.5"])
    assert stable_hash(run_identity(elsewhere)) == stable_hash(run_identity(config))
    assert run_identity(config).keys() == RunConfig.model_fields.keys() - {
        *("cluster", "metadd", "method", "prior", "recover", "select", "given"),
    }  # a set section is part of the identity, and so is another method
    assert run_identity(override(config, ["method=dm"]))["method"] == "dm"
    assert "recover" in run_identity(override(config, ["method=sre2l"]))
    assert "select" not in run_identity(override(config, ["method=sre2l"]))
    assert run_identity(override(config, ["method=select"])).keys() >= {"method", "select"}
    assert "recover" in run_identity(override(config, ["method=own:Method", "recover.block=9"]))
    assert "select" in run_identity(override(config, ["method=own:Method", "select.crops=9"]))
    for same in ("evaluate.seeds=6", "evaluate.full=false", "dataset.path=elsewhere", "distill.checkpoint_every=7"):
        assert stable_hash(run_identity(override(config, [same]))) == stable_hash(run_identity(config))
    assert stable_hash(run_identity(override(config, ["distill.ipc=3"]))) != stable_hash(run_identity(config))


def test_keys_that_the_method_does_not_read_decide_nothing() -> None:
    """Every packaged method names the keys of `distill` that it reads; the others do not change a run's identity."""
    assert unread_keys(RunConfig()) == ["distill.real_batch", "recover", "select", "given"]
    assert unread_keys(RunConfig(method="own:Method")) == []
    for names in (*map(str.split, READ_OF_DISTILL.values()), *UNREAD_BY_MATCHING.values()):
        assert set(names) < DistillConfig.model_fields.keys()
    mtt = RunConfig(method="mtt")
    assert run_identity(override(mtt, ["distill.labels=hard", "distill.learning_rate_labels=0"])) == run_identity(mtt)
    config = RunConfig(method="sre2l")
    other = override(config, ["distill.threshold=3", "select.pool=9"])
    assert unread_values(other) == {"distill.threshold": 3.0, "select": SelectConfig(pool=9).model_dump(mode="json")}
    assert run_identity(other) == run_identity(config)


def test_keys_that_a_user_gives_are_not_those_of_the_base(tmp_path: Path) -> None:
    """A file's own keys and overrides are given, those of its base are not, nor those of a recipe that a run saved."""
    path = tmp_path / "mine.yaml"
    path.write_text("base: digits-ipc1\nmethod: dm\ndistill: {threshold: 3}\n")
    assert keys_given(str(path), ["recover.block=9"]) == {
        *("base", "method", "distill", "distill.threshold", "recover", "recover.block")
    }
    assert keys_given(None, []) == set()
    path.write_text(to_yaml(get_recipe("digits-ipc1")))
    assert keys_given(str(path), []) == set()
    changed = override(get_recipe("digits-ipc1"), ["method=dm"])
    assert "threshold" not in to_yaml(changed, without=unread_keys(changed))
    assert "recover:" not in to_yaml(changed, without=unread_keys(changed))


def test_stable_hash_has_its_pinned_value() -> None:
    """The hash that names folders is pinned, and ignores the order of keys."""
    assert stable_hash({"a": [1, 2.5, None], "b": "é"}) == stable_hash({"b": "é", "a": [1, 2.5, None]})
    assert stable_hash({"a": [1, 2.5, None], "b": "é"}) == "45584828a616e524"


@pytest.mark.parametrize(
    "change",
    ["seed=1", "network.width=64", "experts.epochs=99", "experts.augmentation=crop", "dataset.normalisation=standard"],
)
def test_expert_fingerprint_changes_with_what_experts_depend_on(change: str) -> None:
    """The experts' fingerprint changes with every setting that changes experts, and with the data."""
    base = RunConfig().resolved((32, 32))
    assert expert_fingerprint(base, "d") != expert_fingerprint(base, "e")
    assert expert_fingerprint(override(base, [change]), "d") != expert_fingerprint(base, "d")


def test_sets_of_other_seeds_can_share_their_experts() -> None:
    """Runs of other seeds share the experts, scoring networks and auxiliaries of one `experts.seed`."""
    settings = ["metadd={auxiliaries: [{architecture: lenet}]}", "experts.curriculum={}"]
    base = override(RunConfig(), settings).resolved((32, 32))
    other, shared = override(base, ["seed=1"]), override(base, ["seed=1", "experts.seed=0"])
    for trained in (lambda run: run, lambda run: run.scoring_run, lambda run: run.each_auxiliary()[0]):
        known, apart, same = (expert_fingerprint(trained(run), "d") for run in (base, other, shared))
        assert known == same != apart
    assert len({stable_hash(run_identity(run)) for run in (base, other, shared)}) == 3
    assert "seed" not in run_identity(base)["experts"]
    assert run_identity(override(base, ["experts.seed=0"])) == run_identity(base)
    assert override(shared, ["metadd.experts.seed=3"]).each_auxiliary()[0].expert_seed == 3


STATISTICS = ["dataset.mean=[0.5, 0.5, 0.5]", "dataset.std=[0.2, 0.2, 0.2]"]


def test_given_statistics_change_runs_and_experts_but_no_earlier_run() -> None:
    """Given means and deviations mean standard normalisation, other experts and another run; without, no key is new."""
    standard, given = RunConfig().resolved((96, 96)), override(RunConfig(), STATISTICS).resolved((32, 32))
    assert given.dataset.kind == standard.dataset.kind == "standard"
    other = override(given, ["dataset.std=[0.2, 0.2, 0.3]"])
    assert len({expert_fingerprint(each, "d") for each in (standard, given, other)}) == 3
    assert len({stable_hash(run_identity(each)) for each in (standard, given, other)}) == 3
    assert run_identity(standard)["dataset"].keys().isdisjoint({"mean", "std"})
    assert parse_config(yaml.safe_load(to_yaml(given)), "again") == given


@pytest.mark.parametrize(
    "change",
    ["experts.schedule=cosine", "experts.warmup_epochs=5", "experts.precision=bfloat16", "experts.curriculum={}"],
)
def test_schedules_of_experts_change_what_they_change_and_no_earlier_run(change: str) -> None:
    """A schedule makes other experts and another run, also of auxiliaries; at their defaults the keys are left out."""
    base = override(RunConfig(), ["metadd={auxiliaries: [{architecture: lenet}]}"]).resolved((32, 32))
    for prefix in ("", "metadd."):
        other = override(base, [prefix + change])
        assert run_identity(other) != run_identity(base)
        of = (other, base) if not prefix else [each.each_auxiliary()[0] for each in (other, base)]
        assert expert_fingerprint(of[0], "d") != expert_fingerprint(of[1], "d")
    for experts in (run_identity(base)["experts"], run_identity(base)["metadd"]["experts"]):
        assert experts.keys().isdisjoint({"schedule", "warmup_epochs", "precision", "curriculum"})


def test_networks_that_score_images_are_those_of_every_curriculum_that_trains_them_alike() -> None:
    """Scoring networks depend on how they are trained, not on when experts see which image; YAML keeps a curriculum."""
    base = RunConfig().resolved((32, 32))
    assert base.scoring_run is None
    plain = override(base, ["experts.warmup_epochs=5", "experts.curriculum={scoring_epochs: 3}"])
    others = {
        "experts.curriculum.first_share=0.5": True,
        "experts.curriculum.removals=[]": True,
        "experts.epochs=50": True,
        "experts.curriculum.scoring_epochs=4": False,
        "experts.learning_rate=0.5": False,
    }
    for change, is_shared in others.items():
        other = override(plain, [change, "distill.start_epochs=[0, 9]"])
        assert expert_fingerprint(other, "d") != expert_fingerprint(plain, "d"), change
        runs = [run for each in (plain, other) if (run := each.scoring_run)]
        fingerprints = {expert_fingerprint(run, "d") for run in runs}
        alike = {expert_fingerprint(base.model_copy(update={"experts": run.experts}), "d") for run in runs}
        assert fingerprints.isdisjoint(alike)
        assert len(fingerprints) == 1 + (not is_shared), change
        assert load_config_text(to_yaml(other), "test") == other
    assert plain.scoring_run is not None
    assert (plain.scoring_run.experts.warmup_epochs, plain.scoring_run.kept_epochs) == (2, (0, 1, 3))


def test_how_a_set_is_scored_is_no_part_of_a_run_and_stands_in_the_sets_file() -> None:
    """Labels and training of scored networks may be changed in a finished run; a set's file has those of its recipe."""
    base = RunConfig()
    changes = ["labels=teacher", "temperature=4", "cutmix=1", "learning_rate=0.2"]
    changes += [
        "schedule=cosine",
        "warmup_epochs=5",
        "epochs=100",
        "batch_size=256",
        "micro_batch=64",
        "weight_decay=0.1",
    ]
    changes += ["labels=stored", "keep_labels=3", "top_logits=2"]
    other = override(base, [f"evaluate.{change}" for change in changes])
    assert run_identity(other) == run_identity(base) == recipe_of_set(base)
    more = {change.partition("=")[0] for change in changes}
    assert set(scoring_identity(other)) == more == set(SCORING_KEYS)
    assert recipe_of_set(other)["evaluate"] == run_identity(base)["evaluate"] | scoring_identity(other)
    assert override(RunConfig(), ["evaluate.learning_rate=none"]) == base


def test_a_teacher_of_evaluation_is_the_same_network_for_every_method() -> None:
    """`evaluate.teacher` alone decides its experts, and not the set; it changes nothing while labels are the set's."""
    teacher = "evaluate.teacher={network: {architecture: resnet18, width: 16, norm: batch}, experts: {epochs: 3}}"
    taught = [teacher, "evaluate.labels=teacher", "dataset.normalisation=standard"]
    runs = [override(get_recipe(f"digits-{name}ipc10"), taught).resolved((8, 8)) for name in ("", "dm-", "sre2l-")]
    assert len({each.network for each in runs}) > 1
    of = [teacher_of(run) for run in runs]
    assert len({expert_fingerprint(each, "d") for each in of}) == 1
    assert (of[0].network.architecture, of[0].experts.epochs, of[0].experts.count) == ("resnet18", 3, 1)
    assert [len(trained_networks(run)) for run in runs] == [2, 1, 2]
    roles = [[role_of(run, each) for each in trained_networks(run)] for run in runs]
    assert roles == [["experts", "teacher"], ["teacher"], ["teacher", "teacher"]]
    more = "metadd={auxiliaries: [{architecture: lenet}]}"
    beside = [override(run, [more]).resolved((8, 8)) for run in runs]
    roles = [[role_of(run, each) for each in trained_networks(run)] for run in beside]
    assert roles == [[role, "auxiliaries", "teacher"] for role in ("experts", "experts", "teacher")]
    for run in runs:
        base = override(run, ["evaluate.teacher=null", "evaluate.labels=own"])
        assert run_identity(run) == run_identity(base)
        idle = override(run, ["evaluate.labels=own"])
        assert (idle.own_teacher(), len(trained_networks(idle))) == ([], len(trained_networks(base)))
        assert recipe_of_set(idle) == recipe_of_set(base) != recipe_of_set(run)
        assert load_config_text(to_yaml(run), "test") == run
    assert "teacher" not in run_identity(runs[0])["evaluate"]
    with pytest.raises(ConfigError, match=r"evaluate\.teacher\.experts\.count is 2, and one network labels images"):
        override(runs[0], ["evaluate.teacher.experts.count=2"])


@pytest.mark.parametrize(
    ("change", "count"),
    [("evaluate.labels=teacher", 1), ("evaluate.fair=true", 1), ("evaluate.labels=own", 0)],
)
def test_a_run_without_metadds_terms_keeps_the_teacher_that_it_had(change: str, count: int) -> None:
    """With weights of 0, DM trains its backbone only if the evaluation needs a teacher and the recipe names none."""
    nothing = "metadd={auxiliaries: [{architecture: mlp}], variance: 0, invariance: 0, position: 0}"
    run = override(get_recipe("digits-dm-ipc10"), [nothing, change]).resolved((8, 8))
    assert [each.network for each in trained_networks(run)] == [run.network] * count


def test_a_teacher_that_is_a_backbone_is_trained_once() -> None:
    """A teacher with the network and training of the run's experts is expert 0 of them, and no further network."""
    run = get_recipe("digits-sre2l-ipc10").resolved((8, 8))
    teacher = json.dumps({"network": run.network.model_dump(), "experts": run.experts.model_dump()})
    taught = override(run, ["evaluate.labels=teacher", f"evaluate.teacher={teacher}"])
    assert [each.network for each in trained_networks(taught)] == [run.network]
    assert expert_fingerprint(teacher_of(taught), "d") == expert_fingerprint(run, "d")
    other = override(taught, ["evaluate.teacher.experts.epochs=7"])
    assert len(trained_networks(other)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["evaluate.teacher={network: lenet, experts: {epochs: 3, warmup_epochs: 3}}"],
            r"evaluate\.teacher\.experts\.warmup_epochs is 3, and there are 3 epochs",
        ),
        (["evaluate.teacher={}"], r"evaluate\.teacher\.network is missing"),
        (["evaluate.cutmix=1"], r"evaluate\.cutmix mixes images.*set evaluate\.labels=teacher"),
        (["evaluate.epochs=5", "evaluate.warmup_epochs=5"], r"evaluate\.warmup_epochs is 5, and there are 5 epochs"),
        (["experts.warmup_epochs=100"], r"experts\.warmup_epochs is 100, and there are 100 epochs in all"),
        (
            ["metadd={auxiliaries: [lenet], experts: {epochs: 3, warmup_epochs: 4}}"],
            r"metadd\.experts\.warmup_epochs is 4, and there are 3 epochs",
        ),
        (["evaluate.temperature=0"], r"evaluate\.temperature is 0"),
        (["experts.schedule=step"], r"experts\.schedule is 'step'"),
    ],
)
def test_trainings_that_make_no_sense_are_refused(changes: list[str], message: str) -> None:
    """CutMix under own labels, a warm-up that takes all epochs and unknown schedules are errors with a key."""
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), changes)


@pytest.mark.parametrize(
    "change", ["name=x", "experts.count=3", "distill.ipc=50", "evaluate.seeds=9", "cluster.workers=2"]
)
def test_runs_share_experts_that_do_not_depend_on_what_differs(change: str) -> None:
    """Runs with another synthetic set or more experts share the stored experts."""
    base = RunConfig().resolved((32, 32))
    assert expert_fingerprint(override(base, [change]), "d") == expert_fingerprint(base, "d")


def test_runs_and_experts_from_before_the_size_decided_are_found_again() -> None:
    """A run without normalisation and depth equals, by fingerprint, the older run that names them."""
    networks = "backbones=[{network: {width: 64}}]", "metadd={auxiliaries: [{architecture: lenet}]}"
    scored = "evaluate.networks=[{architecture: mlp}, {width: 8}]"
    before = override(RunConfig(), [*networks, scored, "dataset.normalisation=zca", "network.depth=3"])
    before = override(before, ["backbones=[{network: {width: 64, depth: 3}}]"])
    before = override(before, ["metadd={auxiliaries: [{architecture: lenet, depth: 3}]}"])
    before = override(before, ["evaluate.networks=[{architecture: mlp, depth: 3}, {width: 8, depth: 3}]"])
    now = override(RunConfig(), [*networks, scored]).resolved((32, 32))
    assert now == before == before.resolved((64, 64))
    assert run_identity(now) == run_identity(before)
    assert load_recipe_of_run(to_yaml(now), "recipe.yaml") == before
    assert expert_fingerprint(RunConfig().resolved((32, 32)), "d") == "e4846a6253ab6d5c"
    auxiliary = get_recipe("tiny-imagenet-metadd-ipc50").resolved((64, 64)).each_auxiliary()[0]
    assert expert_fingerprint(auxiliary, "d") == "6b9292582ef83b87"


def test_experts_have_no_fingerprint_before_the_size_of_images_is_known() -> None:
    """Experts of an unresolved configuration have no fingerprint, because the image size decides their network."""
    for change in ("network.depth=null", "dataset.normalisation=auto"):
        config = override(RunConfig().resolved((32, 32)), [change])
        with pytest.raises(ValueError, match=r"RunConfig\.resolved first"):
            expert_fingerprint(config, "d")


def test_the_size_of_images_decides_normalisation_and_depth() -> None:
    """The image size decides normalisation and depth as published and packaged; given values stay."""
    depths = {(s, s): d for s, d in {8: 2, 16: 2, 28: 3, 32: 3, 48: 4, 64: 4, 96: 5, 128: 5, 224: 6}.items()}
    for size, depth in {**depths, (4, 4): 2, (23, 99): 2, (99, 24): 3}.items():
        assert NetworkConfig().resolved(size).depth == depth, size
        assert NetworkConfig(architecture="mlp").resolved(size).depth == 3
        assert NetworkConfig(depth=1).resolved(size).depth == 1
        kind = "zca" if max(size) <= 64 or size == (23, 99) or size == (99, 24) else "standard"
        assert DatasetConfig().resolved(size).kind == kind, size
        assert DatasetConfig(normalisation="zca").resolved(size).kind == "zca"


def test_auxiliaries_that_become_the_same_network_are_refused() -> None:
    """Auxiliaries that the image size resolves to one network are refused."""
    config = override(RunConfig(), ["metadd={auxiliaries: [{width: 8}, {width: 8, depth: 4}]}"])
    config.resolved((32, 32))
    with pytest.raises(ConfigError, match=r"metadd\.auxiliaries\.1 repeats an earlier network"):
        config.resolved((64, 64))


def test_safe_loader_of_others_is_untouched() -> None:
    """`yaml.safe_load` keeps its own rules."""
    assert yaml.safe_load("1e-5") == "1e-5"
    assert str(yaml.safe_load("2024-11-20")) == "2024-11-20"
    assert not isinstance(yaml.safe_load("2024-11-20"), str)


def test_what_each_row_of_workers_computes() -> None:
    """Backbones and auxiliaries share a row of workers unless apart; the first row has the first backbone."""
    networks = ["backbones=[{network: {width: 8}}]", "metadd={auxiliaries: [{architecture: lenet}, {width: 4}]}"]
    expected = {
        (): [((0, 1), (0, 1, 2))],
        ("backbones",): [((0,), (0, 1, 2)), ((1,), ())],
        ("auxiliaries",): [((0, 1), (0,)), ((), (1,)), ((), (2,))],
        ("backbones", "auxiliaries"): [((0,), (0,)), ((1,), ()), ((), (1,)), ((), (2,))],
    }
    for apart, roles in expected.items():
        config = override(RunConfig(), [*networks, *(f"cluster.{name}_apart=true" for name in apart)])
        assert [(role.backbones, role.meta_networks) for role in config.roles] == roles
        assert config.workers_per_set == len(roles)
    assert RunConfig().roles == (RunConfig().whole_role,)


def test_metadd_is_part_of_a_run_only_where_it_is_set() -> None:
    """Unset MetaDD keeps a run's identity as before it existed; scoring on more networks keeps it too."""
    assert "metadd" not in run_identity(RunConfig())
    with_meta = override(RunConfig(), ["metadd={auxiliaries: [{architecture: lenet}]}"])
    assert run_identity(with_meta)["metadd"]["variance"] == 1.0
    assert run_identity(override(with_meta, ["metadd.variance=2.0"])) != run_identity(with_meta)
    scored = scored_on(with_meta, ["lenet", "mlp", "resnet18:16", "convnet"])
    assert run_identity(scored) == run_identity(with_meta)
    names = [(network.architecture, network.width) for network in scored.scored_networks]
    assert names == [("convnet", 128), ("lenet", 128), ("mlp", 128), ("resnet18", 16)]


def test_networks_of_one_architecture_have_names_of_their_own() -> None:
    """Networks of one architecture are named by an unpublished width and by all values that differ."""
    given = [{}, {"width": 16}, {"width": 16, "norm": "none"}, {"architecture": "mlp"}]
    networks = [NetworkConfig.model_validate(each) for each in given]
    assert short_names(networks) == [
        "convnet (width 128, norm instance)",
        "convnet (width 16, norm instance)",
        "convnet (width 16, norm none)",
        "mlp",
    ]
    assert short_names(networks[1:2] + networks[3:]) == ["convnet (width 16)", "mlp"]


def test_choices_that_are_newer_than_finished_runs_do_not_change_them() -> None:
    """A newer key at its former behaviour does not change a run's identity; another value does."""
    plain = RunConfig()
    assert "initial" not in run_identity(plain)["distill"]
    assert {"labels", "unmatched_share", "average_decay"}.isdisjoint(run_identity(plain)["distill"])
    published = ("distill.initial=random", "distill.labels=hard", "distill.gradient_limit=null")
    for change in (*published, "distill.unmatched_share=0.25", "distill.average_decay=0.99"):
        assert run_identity(override(plain, [change])) != run_identity(plain)
    assert "gradient_limit" not in run_identity(override(plain, ["distill.gradient_limit=null"]))["distill"]


def test_run_of_an_earlier_version_had_no_limit(tmp_path: Path) -> None:
    """A saved run without the limit had none; a user's recipe without it gets the default."""
    lines = to_yaml(RunConfig()).splitlines()
    text = "\n".join(line for line in lines if not line.strip().startswith("gradient_limit:"))
    assert len(text.splitlines()) == len(lines) - 1
    assert load_recipe_of_run(text, "recipe.yaml").distill.gradient_limit is None
    assert load_recipe_of_run(to_yaml(RunConfig()), "recipe.yaml") == RunConfig()
    assert load_config_text(text, "mine.yaml").distill.gradient_limit == RunConfig().distill.gradient_limit
    starts = "  first_start: 0\n  start_bound: 10\n  final_start_bound: 20\n  expand_iterations: 1000"
    for saved, limit in ((text, None), (f"distill:\n{starts}\n", RunConfig().distill.gradient_limit)):
        (tmp_path / "recipe.yaml").write_text(re.sub(r"^  start_epochs: .*$", starts, saved, flags=re.MULTILINE))
        assert get_recipe(str(tmp_path / "recipe.yaml")).distill.gradient_limit == limit


@pytest.mark.parametrize("changes", [[], ["rounds=2"], ["crops=falling"], ["rounds=2", "crops=falling"]])
def test_recoveries_of_an_earlier_version_keep_their_rates_and_crops(changes: list[str], tmp_path: Path) -> None:
    """Runs in rounds or with falling crops are others than they were, and their saved recipes are still theirs."""
    sre2l = ["method=sre2l", "distill.initial=random", *(f"recover.{change}" for change in changes)]
    now = override(RunConfig(), sre2l)
    text = re.sub(r"^  restarts: .*\n", "", to_yaml(now), flags=re.MULTILINE)
    before = load_recipe_of_run(text, "recipe.yaml")
    assert (run_identity(before) == run_identity(now)) == (not changes)
    assert before.recover.restarts == "all"
    assert before.recover.crops == ("falling-cut" if "crops=falling" in changes else "published")
    assert "restarts" not in run_identity(before)["recover"]  # earlier versions lacked the key
    (tmp_path / "recipe.yaml").write_text(text)  # as an error about such a run advises
    assert get_recipe(str(tmp_path / "recipe.yaml")).recover == before.recover
    assert load_recipe_of_run(to_yaml(now), "recipe.yaml") == now
    assert load_recipe_of_run(to_yaml(before), "recipe.yaml") == before
    (tmp_path / "mine.yaml").write_text("base: digits-sre2l-ipc10\nrecover: {rounds: 2, crops: falling}\n")
    mine = get_recipe(str(tmp_path / "mine.yaml")).recover
    assert (mine.restarts, mine.crops) == ("adam", "falling")


def test_renamed_key_is_named_and_saved_runs_keep_their_value() -> None:
    """A key's former name is an error with the new one, but is read from a saved run."""
    former = "overshoot"  # former name
    with pytest.raises(
        ConfigError, match=rf"unknown key 'distill\.{former}'\. Its new name is 'distill\.gradient_limit'"
    ):
        override(RunConfig(), [f"distill.{former}=3"])
    text = to_yaml(override(RunConfig(), ["distill.gradient_limit=3.0"])).replace("gradient_limit", former)
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key .* Its new name is 'distill\.gradient_limit'"):
        load_config_text(text, "mine.yaml")
    assert load_recipe_of_run(text, "recipe.yaml").distill.gradient_limit == 3


def test_start_epochs_are_one_value() -> None:
    """Two epochs mean a fixed range; overriding a single key adjusts the others."""
    recipe, fixed = get_recipe("cifar10-ipc10"), get_recipe("digits-ipc10")
    assert "\n  start_epochs: {first: 0, bound: 10, final_bound: 20, expand_iterations: 1000}" in to_yaml(recipe)
    assert "\n  start_epochs: [5, 30]  " in to_yaml(fixed)
    assert override(recipe, ["distill.start_epochs=[0,20]"]).distill.start_epochs == StartEpochs(bound=20)
    assert override(fixed, ["distill.start_epochs.bound=12"]).distill.start_epochs == StartEpochs(first=5, bound=12)
    longer = {"distill.start_epochs.final_bound": 30, "distill.start_epochs.expand_iterations": 5}
    changed = override(recipe, [f"{key}={value}" for key, value in longer.items()]).distill.start_epochs
    assert changed == StartEpochs(bound=10, final_bound=30, expand_iterations=5)
    unlike = unequal_keys(run_identity(recipe), run_identity(override(recipe, ["distill.start_epochs.bound=12"])))
    assert unlike == ["distill.start_epochs.bound (10 there, 12 here)"]


def test_runs_from_before_start_epochs_were_one_key_are_the_runs_they_were(tmp_path: Path) -> None:
    """Saved recipes with several keys of start epochs are read with their pinned identity."""
    pinned = {
        "digits-ipc1": "1fb950465396ce36",
        "digits16-metadd-ipc1": "a63fcd34a03e3161",
        "cifar10-ipc10": "1666f0a406d8aabb",
        "cifar10-ipc500": "2a86ee4d687355be",
        "tiny-imagenet-metadd-ipc50": "ba64a93f982648c2",
    }
    auxiliaries = "metadd.auxiliaries=[resnet18, vgg11, alexnet, vit-small]"  # those that the last one had
    for name, expected in pinned.items():
        changes = [auxiliaries] if name.startswith("tiny") else []
        changes += ["metadd.augmented=false"] if "metadd" in name else []  # as then
        now = override(get_recipe(name), changes).resolved((32, 32))
        identity = run_identity(now)
        identity["distill"]["checkpoint_every"] = now.distill.checkpoint_every  # was part of it once
        assert stable_hash(identity) == expected, name
        keys = "first_start", "start_bound", "final_start_bound", "expand_iterations"
        lines = "\n".join(f"  {key}: {run_identity(now)['distill'][key]}" for key in keys)
        text, count = re.subn(r"^  start_epochs: .*$", lines, to_yaml(now), flags=re.MULTILINE)
        assert count == 1
        before = load_recipe_of_run(text, "recipe.yaml")
        assert run_identity(before) == run_identity(now), name
        with pytest.raises(
            ConfigError, match=r"key 'distill\.first_start'\. Its new name is 'distill\.start_epochs\.f"
        ):
            load_config_text(text, "mine.yaml")
        (tmp_path / "recipe.yaml").write_text(text)  # as an error about such a run advises
        assert run_identity(get_recipe(str(tmp_path / "recipe.yaml"))) == run_identity(now), name
    with pytest.raises(ConfigError, match=r"^recipe\.yaml: 'distill\.start_epochs' is not a section"):
        load_recipe_of_run("distill: {start_epochs: 3, first_start: 0}", "recipe.yaml")


def test_what_metadd_sees_is_part_of_a_run_that_differs_from_earlier_ones() -> None:
    """Earlier runs saw raw images, and SRe2L's views; only other runs have `metadd.augmented` in their identity."""
    base = override(RunConfig(), ["metadd={auxiliaries: [lenet]}"])
    expected = {
        ("datm", PUBLISHED_AUGMENTATION): (True, False),
        ("dm", PUBLISHED_AUGMENTATION): (True, False),
        ("dm", ""): (False, False),
        ("sre2l", PUBLISHED_AUGMENTATION): (False, True),
        ("own:Method", ""): (True, False),
    }
    for (method, augmentation), named in expected.items():
        for augmented, is_named in zip((True, False), named, strict=True):
            settings = [f"method={method}", f"distill.augmentation='{augmentation}'", f"metadd.augmented={augmented}"]
            assert ("augmented" in run_identity(override(base, settings))["metadd"]) == is_named, settings


@pytest.mark.parametrize("method", ["datm", "sre2l"])
def test_saved_runs_of_earlier_versions_say_what_metadd_saw(method: str, tmp_path: Path) -> None:
    """A saved recipe without `metadd.augmented` is read as what it was, also when it is run again; a user's is not."""
    now = override(get_recipe("cifar10-metadd-ipc10"), [f"method={method}"])
    text, count = re.subn(r"^  augmented: .*\n", "", to_yaml(now), flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "recipe.yaml").write_text(text)
    for before in (load_recipe_of_run(text, "recipe.yaml"), get_recipe(str(tmp_path / "recipe.yaml"))):
        assert before.metadd is not None
        assert before.metadd.augmented == (method == "sre2l")
        assert "augmented" not in run_identity(before)["metadd"]
    (tmp_path / "mine.yaml").write_text("base: cifar10-ipc10\nmetadd: {auxiliaries: [lenet]}\n")
    mine = get_recipe(str(tmp_path / "mine.yaml"))
    assert mine.metadd is not None
    assert mine.metadd.augmented


_WORDS = (
    "null ~ 1e3 1_000 0x1f yes on 2024-11-20 1:30 [bold] {a} *x &x !x %x @x `x =1+1 = << ? - | > --- ... #a a=b 'a .5 "
    ".inf 0o17 1. +1 -1e5 09 a] \u2028x \x1b[31m caf\udce9 é 😀 \ufeff \x7f a::b s3:x C:\\x $HOME a%20b <b> \x85 a'b"
)
LOOKS_LIKE_SYNTAX = [
    *_WORDS.split(" "),
    "a: b",
    "a #b",
    "- a",
    " a",
    "a ",
    "a\nb",
    "a\n",
    "\ta",
    "/data/[bold] a=b, c #1",
    "'q'",
    '"q"',
]


def test_text_that_looks_like_syntax_comes_out_of_a_file_as_it_went_in() -> None:
    """Paths, words that YAML reads as numbers, and control characters survive writing and reading."""
    config = get_recipe("digits-ipc1")
    for text in LOOKS_LIKE_SYNTAX:
        dataset = config.dataset.model_copy(update={"path": text})
        there = config.model_copy(update={"dataset": dataset})
        assert load_config_text(to_yaml(there), "test") == there, text


def test_text_that_is_set_is_taken_as_it_stands() -> None:
    """--set keeps a # in a path; null, quotes and outer blanks follow YAML."""
    config = get_recipe("digits-ipc1")
    for text in LOOKS_LIKE_SYNTAX:
        quoted = f"'{text}'" if text.strip(" \t") != text or text in ("null", "'q'", '"q"') else text
        quoted = {"'q'": "\"'q'\"", "a\n": '"a\\n"'}.get(text, quoted)
        assert override(config, [f"dataset.path={quoted}"]).dataset.path == text, text
    assert override(config, ["dataset.path=null"]).dataset.path is None
    assert override(config, ["name=1e3", "cluster.memory=1000"]).name == "1e3"
    assert override(config, ["distill.ipc=2 # two"]).distill.ipc == 2
    with pytest.raises(ConfigError, match=r"name is None: input should be a valid string. Put it into quotes"):
        override(config, ["name=null"])


def test_a_file_s_name_becomes_a_run_s_name(tmp_path: Path) -> None:
    """A file name with blanks becomes a valid name of the run."""
    for name, expected in (("my recipe (1)", "my-recipe-1"), ("a=b", "a-b"), ("[é]", "run"), ("null", "null")):
        (tmp_path / f"{name}.yaml").write_text("seed: 3")
        assert get_recipe(str(tmp_path / f"{name}.yaml")).name == expected
