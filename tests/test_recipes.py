"""Tests the packaged recipes against the published table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from datm_ray.config import RunConfig, override, unread_keys
from datm_ray.core.networks.registry import build_network, spatial_features
from datm_ray.errors import ConfigError
from datm_ray.recipes import get_recipe, recipe_names, recipe_notes
from datm_ray.shape import data_shape
from datm_ray.stages.methods.registry import method_of
from datm_ray.stages.methods.selection import coresets_of

# name: steps, epochs, batch, lr images, lr step size, lr labels, (min, cur, max), end, threshold
PUBLISHED = {
    "cifar10-ipc1": (80, 2, 10, 100, 1e-7, 5, (0, 4, 4), 0, 1.1),
    "cifar10-ipc10": (80, 2, 100, 100, 1e-5, 2, (0, 10, 20), 1000, 1),
    "cifar10-ipc50": (80, 2, 500, 1000, 1e-5, 2, (0, 20, 40), 2000, 1),
    "cifar10-ipc500": (40, 2, 1000, 50, 1e-5, 10, (40, 60, 60), 0, 1),
    "cifar10-ipc1000": (100, 2, 1000, 50, 1e-5, 10, (40, 60, 60), 0, 1),
    "cifar100-ipc1": (40, 3, 100, 1000, 1e-5, 10, (0, 10, 20), 1000, 1),
    "cifar100-ipc10": (80, 2, 1000, 1000, 1e-5, 10, (0, 30, 50), 2000, 1),
    "cifar100-ipc50": (80, 2, 1000, 1000, 1e-5, 10, (20, 70, 70), 0, 1),
    "cifar100-ipc100": (80, 2, 1000, 50, 1e-5, 10, (30, 70, 70), 0, 1),
    "tiny-imagenet-ipc1": (40, 2, 200, 10000, 1e-4, 10, (0, 15, 20), 2000, 1),
    "tiny-imagenet-ipc10": (40, 2, 500, 100, 1e-4, 10, (10, 50, 50), 0, 1),
    "tiny-imagenet-ipc50": (20, 2, 1000, 100, 1e-4, 10, (40, 70, 70), 0, 1),
}

# name: steps, epochs, batch, lr images, lr step size, first step size, bound, normalisation
MTT = {
    "cifar10-mtt-ipc1": (50, 2, 10, 100, 1e-7, 0.01, 2, "zca"),
    "cifar10-mtt-ipc10": (30, 2, 100, 100, 1e-5, 0.001, 20, "zca"),
    "cifar10-mtt-ipc50": (30, 2, 500, 1000, 1e-5, 0.001, 40, "standard"),
    "cifar100-mtt-ipc1": (20, 3, 100, 1000, 1e-5, 0.01, 20, "zca"),
}

# data set: the teacher's epochs, learning rate, weight decay, batch, warm-up, augmentation
TEACHERS = {
    "cifar": (200, 0.1, 5e-4, 128, 0, "crop+flip"),
    "tiny": (50, 0.2, 1e-4, 256, 5, "resized+flip"),
    "imagenet": (90, 0.1, 1e-4, 256, 0, "resized+flip"),
}
# data set: iterations, learning rate, r_bn, smallest crop, flip, shift
RECOVERIES = {
    "cifar": (1000, 0.25, 0.01, 1, False, 4),
    "tiny": (4000, 0.1, 1, 0.08, True, 4),
    "imagenet": (4000, 0.25, 0.01, 0.08, True, 32),
}
# data set: optimiser, learning rate, weight decay, epochs, batch, warm-up, temperature, CutMix, augmentation, labels
STUDENTS = {
    "cifar": ("adamw", 1e-3, 0.01, 400, 128, 0, 30, 0, "crop+flip", "teacher"),
    "tiny": ("sgd", 0.2, 1e-4, 100, 256, 5, 20, 0, "resized+flip", "teacher"),
    "imagenet": ("adamw", 1e-3, 0.01, 300, 1024, 0, 20, 1, "resized+flip", "stored"),
}

ACCURACIES = {
    "cifar10": {1: "46.9±0.5", 10: "66.8±0.2", 50: "76.1±0.3", 500: "83.5±0.2", 1000: "85.5±0.4"},
    "cifar100": {1: "27.9±0.2", 10: "47.2±0.4", 50: "55.0±0.2", 100: "57.5±0.2"},
    "tiny-imagenet": {1: "17.1±0.3", 10: "31.1±0.3", 50: "39.7±0.3"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_distillation_has_the_published_values(name: str) -> None:
    """Each recipe has the values of the authors' configuration files; a fixed range has equal bounds."""
    d = get_recipe(name).distill
    assert (
        d.student_steps,
        d.expert_epochs,
        d.batch_size,
        d.learning_rate_images,
        d.learning_rate_step_size,
        d.learning_rate_labels,
        (d.start_epochs.first, d.start_epochs.bound, d.start_epochs.last + 1),
        d.start_epochs.expand_iterations,
        d.threshold,
    ) == PUBLISHED[name]
    assert (d.iterations, d.initial_step_size) == (10_000, 0.01)
    assert d.augmentation == "color_crop_cutout_flip_scale_rotate"


@pytest.mark.parametrize("name", PUBLISHED)
def test_setting_around_it_is_the_published_one(name: str) -> None:
    """Data, network, experts and evaluation of the recipes are the published ones."""
    config = get_recipe(name)
    source, ipc = name.rsplit("-ipc", 1)
    assert (config.dataset.source, config.distill.ipc) == (source, int(ipc))
    assert config.resolved(data_shape(config.dataset).image[1:]).dataset.normalisation == "zca"
    assert (config.network.architecture, config.network.width, config.network.norm) == ("convnet", 128, "instance")
    assert config.network.depth == (4 if source == "tiny-imagenet" else 3)
    experts = config.experts
    assert (experts.count, experts.epochs, experts.batch_size) == (100, 100, 256)
    assert (experts.learning_rate, experts.momentum, experts.weight_decay) == (0.01, 0, 0)
    assert experts.augmentation == config.evaluate.augmentation == "color_crop_cutout_flip_scale_rotate"
    assert (config.evaluate.protocol, config.evaluate.seeds) == ("published", 5)


@pytest.mark.parametrize("name", MTT)
def test_recipes_of_mtt_have_its_values_and_what_the_method_needs(name: str) -> None:
    """Recipes of MTT have its published values, SGD experts of 50 epochs that they share, and pass its checks."""
    config = get_recipe(name)
    d, experts = config.distill, config.experts
    assert (
        d.student_steps,
        d.expert_epochs,
        d.batch_size,
        d.learning_rate_images,
        d.learning_rate_step_size,
        d.initial_step_size,
        d.start_epochs.bound,
        config.dataset.normalisation,
    ) == MTT[name]
    assert (d.iterations, d.initial, d.ipc) == (5000, "random", int(name.rsplit("ipc")[-1]))
    assert (experts.count, experts.epochs, experts.optimiser, experts.learning_rate) == (100, 50, "sgd", 0.01)
    assert experts.keep_epochs == max(get_recipe(other).latest_matched for other in MTT)
    method_of(config).check(config)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "-sre2l-" in name and "digits" not in name])
def test_recipes_of_sre2l_have_the_values_of_the_authors_programs(name: str) -> None:
    """Teacher, recovery and scored networks of SRe2L's recipes have the published values, of CIFAR-100 for CIFAR-10."""
    config, of = get_recipe(name), next(each for each in RECOVERIES if name.startswith(each))
    teacher, recover, scored = config.experts, config.recover, config.evaluate
    assert (
        teacher.epochs,
        teacher.learning_rate,
        teacher.weight_decay,
        teacher.batch_size,
        teacher.warmup_epochs,
        teacher.augmentation,
    ) == TEACHERS[of]
    assert (teacher.count, teacher.momentum, teacher.schedule, teacher.optimiser) == (1, 0.9, "cosine", "sgd")
    assert (
        config.distill.iterations,
        recover.learning_rate,
        recover.statistics,
        recover.least_share,
        recover.flip,
        recover.shift,
    ) == RECOVERIES[of]
    assert (recover.block, recover.first_layer, recover.crops, recover.rounds) == (100, 10, "published", 1)
    assert (config.distill.initial, config.distill.ipc) == ("noise", int(name.rsplit("ipc")[-1]))
    assert (
        scored.optimiser,
        scored.learning_rate,
        scored.weight_decay,
        scored.epochs,
        scored.batch_size,
        scored.warmup_epochs,
        scored.temperature,
        scored.cutmix,
        scored.augmentation,
        scored.labels,
    ) == STUDENTS[of]
    assert (scored.schedule, scored.keep_labels, scored.top_logits) == ("cosine", None, None)
    assert not scored.full  # it would take most of the run's time; the teacher is the ceiling
    assert (config.network.architecture, config.network.width, config.network.norm) == ("resnet18", 128, "batch")


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_have_the_normalisation_and_depth_that_their_images_would_give(name: str) -> None:
    """Recipes have the normalisation and depth that the image size gives, except those of digits."""
    config = get_recipe(name)
    size = (config.dataset.resize,) * 2 if config.dataset.resize else data_shape(config.dataset).image[1:]
    assert config.network == config.network.model_copy(update={"depth": None}).resolved(size)
    if config.dataset.source != "digits" and config.method == "datm":
        assert config.resolved(size).dataset.kind == "zca"


@pytest.mark.parametrize("name", PUBLISHED)
def test_notes_quote_the_published_accuracy(name: str) -> None:
    """A recipe's notes quote the published accuracy."""
    source, ipc = name.rsplit("-ipc", 1)
    assert f"{ACCURACIES[source][int(ipc)]} %" in recipe_notes(name)


def test_embedded_recipes_need_no_files() -> None:
    """Recipes of the embedded digits need no files, never flip them, and come first in the list."""
    digits = [name for name in recipe_names() if name.startswith("digits-")]
    assert {"digits-ipc1", "digits-ipc10"} <= set(digits)
    assert recipe_names()[: len(digits)] == digits
    for config in map(get_recipe, digits):
        assert (config.dataset.source, config.dataset.path) == ("digits", None)
        assert config.distill.ipc == (int(ipc) if (ipc := config.name.partition("ipc")[2]) else 1)
        operations = {config.experts.augmentation, config.evaluate.augmentation}
        if "distill.augmentation" not in unread_keys(config):
            operations.add(config.distill.augmentation)
        assert not any("flip" in strategy for strategy in operations)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "-metadd-" in name])
def test_metadd_is_added_to_a_recipe_and_changes_nothing_else(name: str) -> None:
    """A recipe with MetaDD differs from its base by MetaDD and the networks of its table alone; digits are larger."""
    config, base = get_recipe(name), get_recipe(name.replace("-metadd", "").replace("digits16", "digits"))
    assert config.metadd is not None
    unlike: dict[str, Any] = {"name": True, "metadd": True, "evaluate": {"networks"}}
    unlike |= {"dataset": True} if name.startswith("digits16") else {}
    assert config.model_dump(exclude=unlike) == base.model_dump(exclude=unlike)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "-metadd-" in name and "digits" not in name])
def test_networks_that_the_paper_of_metadd_keeps_unseen_are_scored_and_take_no_part(name: str) -> None:
    """AlexNet, ResNet-50 and VGG are in the table of networks, and neither backbone nor auxiliaries are of them."""
    config = get_recipe(name)
    seen = {config.network.architecture, *(each.network.architecture for each in config.each_auxiliary())}
    assert seen == {"convnet", "resnet18", "mobilenet-v2", "vit-small"}
    assert {each.architecture for each in config.evaluate.networks} == {"alexnet", "resnet50", "vgg11"}


@pytest.mark.parametrize("name", [name for name in recipe_names() if "-metadd-" in name])
def test_terms_of_metadd_weigh_as_much_as_their_host_needs(name: str) -> None:
    """MetaDD's terms have the weights that moved the meta-feature ratio on digits: in SRe2L a hundredfold."""
    metadd, factor = get_recipe(name).metadd, 100 if "-sre2l-" in name else 1
    assert metadd is not None
    assert (metadd.variance, metadd.invariance, metadd.position) == (factor, factor / 100, factor / 10)
    assert ("digits only" in recipe_notes(name)) == ("-sre2l-" in name)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "-metadd-" in name])
def test_auxiliaries_of_metadd_see_more_than_one_place(name: str) -> None:
    """At the recipe's image size, MetaDD's auxiliaries have maps of several places and distinct architectures."""
    config = get_recipe(name)
    shape = data_shape(config.dataset)
    seen = set()
    for each in config.each_auxiliary():
        network = build_network(each.network.for_images(shape.image[0], shape.image[1:], shape.classes), seed=0).eval()
        with torch.no_grad():
            maps, logits = spatial_features(network, torch.zeros(1, *shape.image))
        assert logits.shape == (1, shape.classes)
        assert maps.shape[2] * maps.shape[3] > 1
        seen.add(each.network.architecture)
    assert len(seen) == len(config.each_auxiliary())
    assert config.network.architecture not in seen


def test_recipes_of_one_data_set_share_their_experts() -> None:
    """Recipes of one data set share their experts."""
    for source in ("digits", *ACCURACIES):
        configs = [get_recipe(name) for name in recipe_names() if name.rsplit("-ipc", 1)[0] == source]
        assert len({(config.dataset, config.network, config.experts, config.seed) for config in configs}) == 1


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_a_valid_configuration_with_its_own_name(name: str) -> None:
    """Each recipe is a valid configuration with its own name, and notes that say what it is."""
    config = get_recipe(name)
    assert config.name == name
    assert RunConfig.model_validate(config.model_dump()) == config
    assert recipe_notes(name).splitlines()[0].endswith(("%.", ".", "experts."))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_coresets_under_the_same_labels(name: str) -> None:
    """Coresets of a recipe are accepted, share its data, experts and scoring, and have as many images.

    Teachers of SRe2L store too few epochs for forgetting, unless the recipe asks for more.
    """
    layout = ["cluster.precision=bfloat16", "cluster.shards=2", "evaluate.labels=teacher"]
    config, epochs = override(get_recipe(name), layout), ["experts.keep_epochs=null"]
    assert len(coresets_of(config)) == (2 if config.method == "sre2l" else 3)
    found = coresets_of(config := override(config, epochs))
    assert [each.name for each in found] == [f"{name}-{by}" for by in ("moderate", "el2n", "forgetting")]
    for each in found:
        method_of(each).check(each)
        shared = ("dataset", "network", "experts", "evaluate", "seed")
        assert all(getattr(each, key) == getattr(config, key) for key in shared)
        assert each.distill.ipc == config.distill.ipc
        assert method_of(each).has_soft_labels(each) == method_of(config).has_soft_labels(config)
    assert [each.select.by for each in coresets_of(found[0])] == ["el2n", "forgetting"]


def test_unknown_recipe_suggests_the_nearest() -> None:
    """An unknown recipe is an error that suggests the nearest one, or how to list all."""
    with pytest.raises(ConfigError, match=r"unknown recipe 'cifar10-icp10'\. Did you mean 'cifar10-ipc10'\?"):
        get_recipe("cifar10-icp10")
    with pytest.raises(ConfigError, match="recipe list"):
        get_recipe("zzz")
    with pytest.raises(ConfigError, match="unknown recipe"):
        recipe_notes("zzz")
