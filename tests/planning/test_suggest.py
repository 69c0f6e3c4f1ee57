"""Tests of the rules that choose a recipe for images of one's own."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datm_ray.config import DatasetConfig, RunConfig, override, unread_keys
from datm_ray.data.reading import decode
from datm_ray.data.sources import ImageSet, RawDataset, load_raw
from datm_ray.errors import ConfigError, DatasetError
from datm_ray.methods.trajectory.distance import Distance
from datm_ray.planning.duration import Proposal
from datm_ray.planning.init import draft, rules_others
from datm_ray.planning.init.draft import EXACT_FROM, LEAST_ITERATIONS, Draft, Planner, Wish
from datm_ray.planning.init.rules_matching import ENOUGH_EXPERTS, ENOUGH_ITERATIONS, LEAST_EXPERTS, MOST_SHARED
from datm_ray.planning.init.rules_others import ENOUGH_UPDATES
from datm_ray.planning.init.suggest import RULES, Suggestion, default_name, read_images, source_of, suggest
from datm_ray.planning.machines import parse_cluster
from datm_ray.recipes import get_recipe
from datm_ray.shape import KNOWN_SHAPES, DataShape
from datm_ray.stages.methods.memory import plans_of
from datm_ray.stages.methods.registry import METHODS, method_of
from tests.conftest import load_config_text


def raw(counts: list[int], image: tuple[int, int, int], validation: int = 1) -> RawDataset:
    """Empty images, so many of each class; `validation` images of each class are for validation."""

    def part(numbers: list[int]) -> ImageSet:
        labels = np.repeat(np.arange(len(numbers)), numbers)
        return ImageSet(np.zeros((len(labels), *image), np.uint8), labels)

    names = tuple(f"class {number}" for number in range(len(counts)))
    left, held_out = [count - validation for count in counts], [validation] * len(counts)
    own, tested = part(held_out), part([5] * len(counts))
    return RawDataset("mine", names, part(left), validation=own, test=tested, fingerprint="0" * 16)


def planner(data: RawDataset, cluster: str = "cpus=2,gflops=60", exact: str = "") -> Planner:
    """Plans on a described machine, whose speeds nobody measures; on `exact` if compiled steps are asked for."""
    shape = DataShape((data.channels, *data.size), data.classes, len(data.train) + len(data.validation))

    def plan(config: RunConfig, exactly: bool) -> Proposal:
        config = config.resolved(data.size)
        return Proposal(config, shape, plans_of(config, shape), parse_cluster(exact if exactly and exact else cluster))

    return plan


def suggested(
    data: RawDataset, ipc: int, minutes: float = 20, cluster: str = "cpus=2,gflops=60", method: str = "datm"
) -> Suggestion:
    wish = Wish("mine", ipc, 60 * minutes, method)
    return suggest(wish, DatasetConfig(source="folder", path="/data/mine"), data, planner(data, cluster))


def test_an_epoch_has_enough_steps_whatever_the_number_of_images() -> None:
    """Batches shrink with the data until an epoch has 25 steps or the batch is 16; large data get the published one."""
    found = {}
    for count in (8, 80, 450, 4500):
        config = suggested(raw([count] * 10, (3, 32, 32)), 1).config.experts
        found[count] = (config.batch_size, config.learning_rate)
    assert found == {8: (16, 0.02), 80: (16, 0.02), 450: (128, 0.02), 4500: (256, 0.01)}


def test_starts_agree_with_the_published_and_the_digits_recipes() -> None:
    """By learning rate times steps, the range ends where recipes with known results end, within a third."""
    cases = {"cifar10-ipc1": 1, "cifar10-ipc10": 10, "cifar10-ipc50": 50}
    cifar = raw([5000] * 10, (3, 32, 32), 500)
    for name, ipc in cases.items():
        known, ours = get_recipe(name).distill.start_epochs.last + 1, suggested(cifar, ipc).config.distill.start_epochs
        assert 2 / 3 <= ours.bound / known <= 1.5, name
    digits = suggested(raw([144] * 10, (1, 8, 8), 14), 10).config
    distance = digits.distill.start_epochs.bound * digits.experts.learning_rate * -(-1300 // digits.experts.batch_size)
    assert 2 / 3 <= distance / (30 * 0.02 * 39) <= 1.5  # digits-ipc10: 1,222 images in batches of 32


def test_documented_distances_are_those_of_the_recipes() -> None:
    """The table of rules in the documentation has the steps and distances that the packaged recipes have."""

    def known(*names: str) -> list[tuple[RunConfig, Distance, float]]:
        configs = [get_recipe(name) for name in names]
        trained = [KNOWN_SHAPES[each.dataset.source].trained(each.dataset) for each in configs]
        found = [Distance.of(config, images) for config, images in zip(configs, trained, strict=True)]
        return [(config, each, each.expert / each.expert_epochs) for config, each in zip(configs, found, strict=True)]

    digits, cifar = known("digits-ipc1", "digits-ipc10"), known("cifar10-ipc1", "cifar10-ipc10", "cifar10-ipc50")
    ends, steps = [], []
    for group in (cifar, digits):
        ends.append(", ".join(f"{(config.distill.start_epochs.last + 1) * epoch:.0f}" for config, _, epoch in group))
        steps.append(sorted(each.expert / each.student_steps for _, each, _ in group))
    page = (Path(__file__).parents[2] / "docs/your-images.md").read_text(encoding="utf-8")
    assert f"{digits[0][1].steps_per_epoch} steps an epoch for digits" in page
    assert f"DATM on CIFAR-10 ends at {ends[0]} for IPC 1, 10, 50; digits at {ends[1]} for 1, 10" in page
    assert f"those of the digits' recipes have {digits[0][0].experts.epochs * digits[0][2]:.0f}" in page
    assert (
        f"{steps[0][0]:.3f} in DATM on CIFAR-10 up to IPC 50, {steps[1][0]:.2f} to {steps[1][-1]:.2f} for digits"
        in page
    )
    assert f"CIFAR-10 is {cifar[0][2]:.1f} in" in page


def test_late_starts_are_for_sets_that_are_a_large_share_of_the_data() -> None:
    """Early epochs are left out only where the set is large, and never more than half of the range."""
    shares = {}
    for ipc in (1, 50, 500, 2000):
        starts = suggested(raw([5000] * 10, (3, 32, 32), 500), ipc, 10_000).config.distill.start_epochs
        shares[ipc] = starts.first / starts.bound
    assert shares[1] == 0
    assert shares[50] < 0.1 < shares[500] < 0.45 < shares[2000] <= 0.5


def test_more_time_gives_more_of_everything_and_is_not_exceeded() -> None:
    """With the time grow width, experts and iterations; the plan stays below it unless it is too short for any."""
    data = raw([80] * 10, (3, 32, 32), 8)
    found = [suggested(data, 10, minutes) for minutes in (15, 60, 600)]
    sizes = [(each.config.network.width, each.config.experts.count, each.config.distill.iterations) for each in found]
    assert sizes == sorted(sizes)
    for minutes, each in zip((15, 60, 600), found, strict=True):
        assert sum(each.plan.clock.values()) <= 60 * minutes
    least = suggested(data, 10, 0.1)
    assert least.config.distill.iterations == LEAST_ITERATIONS
    assert sum(least.plan.clock.values()) > 6
    assert "the least; 6 s would be too short for more" in least.reasons["distill.iterations"]


def test_a_long_run_is_planned_with_the_times_of_compiled_steps() -> None:
    """From 15 minutes on, compiled steps of the chosen width are timed and decide; below, small steps do."""
    data, source = raw([80] * 10, (3, 32, 32), 8), DatasetConfig(source="folder", path="/data/mine")
    plans, timed = planner(data, exact="cpus=2,gflops=4"), list[tuple[int, bool]]()

    def plan(config: RunConfig, exactly: bool) -> Proposal:
        timed.append((config.network.width, exactly))
        return plans(config, exactly)

    short = suggest(Wish("mine", 1, EXACT_FROM - 60), source, data, plan)
    assert not any(exactly for _, exactly in timed)
    long = suggest(Wish("mine", 1, EXACT_FROM), source, data, plan)
    widths = [each.config.network.width for each in (short, long)]
    assert widths[1] < widths[0]  # the compiled steps are slower here
    assert (widths[0], True) in timed  # tried, and found too wide
    assert timed[-1] == (widths[1], True)
    assert sum(long.plan.clock.values()) <= EXACT_FROM


def test_one_worker_distils_a_set_for_which_sums_would_take_too_long() -> None:
    """Two workers share large images; small ones are left to one, whose iterations are shorter without sums."""
    found = {side: suggested(raw([144] * 10, (1, side, side), 14), 1, 8) for side in (8, 64)}
    assert {side: each.config.cluster.shards for side, each in found.items()} == {8: 1, 64: 2}
    assert "longer than they save" in found[8].reasons["cluster.shards"]
    assert "all workers" in found[64].reasons["cluster.shards"]


def test_there_are_rather_fewer_experts_than_too_few_iterations() -> None:
    """Experts beyond four give way to iterations, up to their enough."""
    counts = {
        minutes: (config.experts.count, config.distill.iterations)
        for minutes in (5, 8, 12, 20)
        for config in [suggested(raw([40] * 3, (3, 64, 64), 4), 10, minutes).config]
    }
    for count, iterations in counts.values():
        assert count <= ENOUGH_EXPERTS + 1 or iterations >= ENOUGH_ITERATIONS, counts


@pytest.mark.parametrize("method", ["datm", "mtt"])
@pytest.mark.parametrize("free", [1e9, 20e9, 200e9])
def test_experts_take_at_most_a_tenth_of_the_free_disk(free: float, method: str) -> None:
    """Few images have many short epochs: fewer are kept, and fewer experts are trained if space is short."""
    data, source = raw([3] * 3, (3, 16, 16)), DatasetConfig(source="folder", path="/data/mine")
    found = {
        disk: suggest(Wish("mine", 1, 60 * 14, method, disk), source, data, planner(data, "cpus=8,gflops=60"))
        for disk in (free, math.inf)
    }
    limited, other = found[free], found[math.inf]
    assert limited.plan.storage["store"] <= 0.1 * free < other.plan.storage["store"]
    assert 2 <= limited.config.experts.count < other.config.experts.count
    assert limited.config.distill.iterations > other.config.distill.iterations  # the time is filled all the same
    assert limited.config.experts.keep_epochs is None
    few = limited.config.experts.count == LEAST_EXPERTS
    held = "the least; a tenth of the free disk holds no more" if few else "as many as a tenth of the free disk holds"
    assert limited.reasons["experts.count"] == held
    assert sum(limited.plan.clock.values()) <= 60 * 14


@pytest.mark.parametrize("free", [0, 1e9])
def test_a_full_disk_is_the_reason_for_what_it_limits(free: float) -> None:
    """The reasons of width and experts name the disk where it limits them, and the time alone where it does."""
    data, source = raw([3] * 3, (3, 16, 16)), DatasetConfig(source="folder", path="/data/mine")
    full, hasty = (
        suggest(Wish("mine", 1, 60 * minutes, "datm", disk), source, data, planner(data, "cpus=8,gflops=60"))
        for disk, minutes in ((free, 14), (math.inf, 0.1))
    )
    assert full.config.network.width < 128
    assert full.reasons["network.width"].endswith("300 iterations in 14 min, or too few experts on the free disk")
    assert "a tenth of the free disk holds" in full.reasons["experts.count"]
    assert hasty.reasons["network.width"].endswith("300 iterations in 6 s")
    assert hasty.reasons["experts.count"] == "the least; 6 s would be too short for more"
    if not free:
        assert full.config.experts.count == LEAST_EXPERTS
        assert full.reasons["experts.count"] == "the least; a tenth of the free disk holds no more"


def test_all_epochs_are_kept_while_they_are_small() -> None:
    """Experts share all their epochs where these take little space, and those that are matched where not."""
    small, large = suggested(raw([450] * 10, (3, 32, 32), 45), 10), suggested(raw([3] * 3, (3, 16, 16)), 1, 14)
    assert small.config.experts.keep_epochs == small.config.experts.epochs
    assert small.plan.storage["store"] < MOST_SHARED
    assert large.config.experts.keep_epochs is None
    assert "too much space" in large.reasons["experts.keep_epochs"]


def test_every_chosen_value_has_its_reason_in_a_recipe_that_reads_back() -> None:
    """The text is the configuration, resolved or not, and each line of a value has a comment."""
    suggestion = suggested(raw([80] * 10, (3, 64, 64), 8), 1)
    assert load_config_text(str(suggestion), "mine.yaml") == suggestion.config
    lines = str(suggestion).splitlines()
    values = [number for number, line in enumerate(lines) if re.match(r" *\w+: ?\S", line)]
    assert len(values) == len(suggestion.reasons)
    assert all("# " in lines[number] or "  # " in lines[number - 1] for number in values)


SHAPES = [((3, 64, 64), 30), ((3, 32, 32), 60), ((1, 8, 8), 0.1)]
"""Image [c h w], and minutes."""


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize(("image", "minutes"), SHAPES)
def test_every_method_has_a_recipe_that_it_accepts(method: str, image: tuple[int, int, int], minutes: float) -> None:
    """The method takes the recipe, reads every value in it, and each value has its reason; it reads back."""
    data = raw([80] * 10, image, 8)
    suggestion = suggested(data, 10, minutes, method=method)
    config = suggestion.config
    assert (config.method, config.name) == (method, "mine")
    method_of(config).check(config.resolved(data.size))
    method_of(config).check_images(config, data)
    assert not suggestion.reasons.keys() & set(unread_keys(config))
    assert load_config_text(str(suggestion), "mine.yaml") == config
    assert all(suggestion.reasons.values())


@pytest.mark.parametrize("method", RULES)
def test_every_method_gets_larger_networks_with_more_time_and_keeps_to_it(method: str) -> None:
    """With the time grow widths, and the plan stays below it."""
    found = [suggested(raw([80] * 10, (3, 32, 32), 8), 10, minutes, method=method) for minutes in (20, 600)]
    assert found[0].config.network.width < found[1].config.network.width
    for minutes, each in zip((20, 600), found, strict=True):
        assert sum(each.plan.clock.values()) <= 60 * minutes


def test_recipes_of_mtt_are_those_of_datm_from_the_first_epoch_on() -> None:
    """A recipe of mtt has the experts of datm's, starts at epoch 0 also for large sets, and sets no learned labels."""
    data = raw([500] * 10, (3, 32, 32), 50)
    mtt, datm = (suggested(data, 200, 600, method=method).config for method in ("mtt", "datm"))
    assert mtt.distill.start_epochs.first == 0 < datm.distill.start_epochs.first
    assert mtt.distill.start_epochs.bound == datm.distill.start_epochs.bound
    assert mtt.experts == datm.experts
    assert mtt.distill.initial == "random"


def test_more_iterations_of_dm_take_longer_also_where_validations_run_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Validations run beside ten iterations and not beside five, so ten are planned shorter than five. The rules
    divide by the time of an iteration alone, and fill the time."""
    times: dict[int, float] = {}

    def clock(self: Draft, values: dict[str, Any]) -> dict[str, float]:
        count = values["distill.iterations"]
        found = {"distillation": 0.5 * count, "validation": 50.0 if count < 10 else 25.0}
        times[count] = sum(found.values())
        return found

    monkeypatch.setattr(Draft, "clock", clock)
    data = raw([80] * 2, (3, 32, 32), 8)
    wish = Draft(Wish("mine", 1, 180, "dm"), DatasetConfig(source="folder", path="/data/mine"), data, planner(data))
    count = rules_others._iterations(wish, {}, 10_000)["distill.iterations"]
    assert times[10] < times[5]
    assert clock(wish, {"distill.iterations": count})["distillation"] == pytest.approx(wish.planned_seconds - 25, abs=1)
    assert rules_others._iterations(wish, {}, 100)["distill.iterations"] == 100


def limited(data: RawDataset, fits: Callable[[RunConfig], bool]) -> Planner:
    """Plans that refuse a recipe which does not fit, as those of a machine with little memory do."""
    plans = planner(data, "cpus=8,gflops=60")

    def plan(config: RunConfig, exactly: bool) -> Proposal:
        if not fits(config):
            raise ConfigError("a worker needs 9.0 GiB and may take 3.0 GiB", "", "use --set cluster.shards=8")
        return plans(config, exactly)

    return plan


def test_a_recipe_is_found_where_some_do_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that one worker cannot hold is divided over all, and one that is too large for a width gets another; many
    student steps give way to fewer. If nothing fits, the error names options of init."""
    data, source = raw([80] * 8, (3, 32, 32), 8), DatasetConfig(source="folder", path="/data/mine")

    def found(fits: Callable[[RunConfig], bool]) -> RunConfig:
        return suggest(Wish("mine", 1, 60 * 120), source, data, limited(data, fits)).config

    monkeypatch.setattr(draft, "machine_here", lambda config: parse_cluster("cpus=8,gflops=60"))
    roomy = found(lambda config: True)
    assert found(lambda config: config.cluster.shards == 8).cluster.shards == 8
    assert found(lambda config: config.cluster.shards == 1).cluster.shards == 1
    assert found(lambda config: config.network.width < roomy.network.width).network.width < roomy.network.width
    few = found(lambda config: config.distill.student_steps < roomy.distill.student_steps)
    assert few.distill.student_steps == roomy.distill.student_steps // 2
    with pytest.raises(ConfigError, match=r"9\.0 GiB and may take.*(?i:ask for fewer images per class)") as caught:
        found(lambda config: False)
    assert "--set" not in str(caught.value)


def test_reasons_at_a_limit_say_so() -> None:
    """Days on many cores give the published numbers of experts, iterations and student steps, with that as the reason;
    networks on all real images train as long as the experts."""
    found = suggested(raw([80] * 10, (1, 16, 16), 8), 1, 60 * 48, "cpus=64,gflops=60")
    config = found.config
    assert (config.experts.count, config.distill.iterations, config.distill.student_steps) == (100, 10_000, 80)
    for key in ("experts.count", "distill.iterations", "distill.student_steps"):
        assert found.reasons[key] == "as published", key
    assert config.evaluate.real_epochs == config.experts.epochs
    few = suggested(raw([80] * 10, (1, 16, 16), 8), 1, 15)
    assert few.config.distill.student_steps < 80
    longer = suggested(raw([80] * 10, (1, 16, 16), 8), 1, 60)
    assert longer.config.evaluate.real_epochs == longer.config.experts.epochs
    updates = suggested(raw([80] * 10, (1, 16, 16), 8), 1, 60 * 48, "cpus=64,gflops=60", method="dm")
    assert updates.reasons["distill.iterations"] == "as published"


def test_too_little_time_names_what_would_take_less() -> None:
    """The line for many classes names the longest stage and what shortens it, and that does take less time."""
    data = raw([50] * 300, (3, 64, 64), 5)
    found = suggested(data, 10, 5)
    (line,) = found.warnings
    assert (
        "longer than the 5 min that you asked for, its evaluation alone 1 h 4 min. datm has no shorter recipe" in line
    )
    assert "Try: run it with --set evaluate.seeds=1, which scores one network a row, fewer classes" in line
    fewer = planner(data)(override(found.config, ["evaluate.seeds=1"]), False)
    assert fewer.clock["evaluation"] < found.plan.clock["evaluation"] / 2
    many = suggested(raw([400] * 10, (3, 64, 64), 40), 1, 0.5)
    assert "its experts alone" in many.warnings[0]
    assert "Try: --method dm or select, fewer classes" in many.warnings[0]
    for method in ("dm", "select"):
        lighter = suggested(raw([400] * 10, (3, 64, 64), 40), 1, 0.5, method=method)
        assert sum(lighter.plan.clock.values()) < sum(many.plan.clock.values()), method


def test_accuracies_on_few_images_are_warned_of() -> None:
    """Three images a class are a recipe whose scores mean nothing, and a line says so; a hundred are enough."""
    data = raw([3] * 2, (3, 16, 16))
    (line,) = suggested(data, 1, 15).warnings
    assert "Accuracies on 2 validation images say little: by chance alone they may be off by 71 points" in line
    assert not suggested(raw([1000] * 10, (3, 16, 16), 100), 1, 15).warnings


def test_images_on_s3_are_refused_in_words(tmp_path: Path) -> None:
    """An address is no path below the working folder; the line says that images are read from a disk."""
    for path in ("s3://bucket/birds", "s3://bucket/train.parquet,s3://bucket/test.parquet", "https://host/birds.zip"):
        for read in (lambda path: read_images(path, None), lambda path: load_raw("folder", path)):
            with pytest.raises(DatasetError, match=rf"cannot be read from {path}\. Images are read from a disk"):
                read(path)


def test_recipes_of_dm_read_no_more_images_than_there_are() -> None:
    """dm takes the published 256 real images of a class where there is time, fewer where not, and never too many."""
    found = {
        (count, minutes): suggested(raw([count] * 10, (3, 32, 32), count // 10), 1, minutes, method="dm").config.distill
        for count, minutes in ((1000, 600), (1000, 20), (100, 600))
    }
    assert [each.real_batch for each in found.values()] == [256, 128, 90]
    assert all(each.iterations >= ENOUGH_UPDATES for each in found.values())


def test_too_few_images_for_batch_statistics_are_refused() -> None:
    """A set smaller than any useful batch is refused for sre2l, in one line that says how many would do."""
    with pytest.raises(ConfigError, match=r"3 images is too small for sre2l.*Ask for 11 images per class or more"):
        suggested(raw([80] * 3, (3, 32, 32), 8), 1, method="sre2l")
    suggested(raw([80] * 3, (3, 32, 32), 8), 11, method="sre2l")


@pytest.mark.slow
def test_recipes_of_sre2l_have_the_views_of_their_sizes() -> None:
    """Views are mirrored at the sizes for which they were published so: large pictures, neither CIFAR nor digits."""
    sides = {8: False, 32: False, 64: True}
    for side, is_flipped in sides.items():
        found = suggested(raw([80] * 10, (3, side, side), 8), 10, method="sre2l").config.recover
        assert (found.flip, found.least_share < 1) == (is_flipped, side == 64), side


def test_a_method_without_rules_is_refused() -> None:
    """Only packaged methods have rules; the line names them."""
    for method in ("mtd", "my_methods:Own"):
        with pytest.raises(ConfigError, match=r"no rules .*Choose one of datm, mtt, dm, select, sre2l"):
            suggested(raw([80] * 3, (3, 32, 32), 8), 1, method=method)
    assert RULES.keys() == METHODS.keys() - {"given"}
    assert default_name("/data/birds.zip", 10) == "birds-ipc10"
    assert default_name("/data/birds.zip", 10, "dm") == "birds-dm-ipc10"


@pytest.mark.parametrize(("counts", "ipc", "left"), [([25, 60, 100], 10, 10), ([12, 60], 10, 10), ([11, 60], 10, 10)])
def test_validation_leaves_the_images_that_the_set_starts_from(counts: list[int], ipc: int, left: int) -> None:
    """The share for validation shrinks until the smallest class keeps as many training images as the set has."""
    share = suggested(raw(counts, (3, 32, 32)), ipc).config.dataset.validation
    smallest = min(counts)
    assert smallest - max(1, int(share * smallest + 0.5)) >= left


def test_more_images_per_class_than_there_are_is_an_error() -> None:
    """The line names the class and its images."""
    with pytest.raises(DatasetError, match=r"class 1. has 10 images"):
        suggested(raw([30, 10], (3, 32, 32)), 10)


def test_small_and_grey_images_get_fitting_augmentation() -> None:
    """No colour without colours; nothing but moves where cutout and flip would make another picture."""
    found = {
        image: suggested(raw([80] * 3, image, 8), 1).config.evaluate.augmentation
        for image in ((3, 32, 32), (1, 32, 32), (1, 16, 16))
    }
    assert found == {
        (3, 32, 32): "color_crop_cutout_flip_scale_rotate",
        (1, 32, 32): "crop_cutout_flip_scale_rotate",
        (1, 16, 16): "crop_scale_rotate",
    }


@pytest.mark.parametrize(("sides", "resized"), [([64], None), ([65], 64), ([80, 90], 64)])
def test_each_image_is_decoded_once(
    sides: list[int], resized: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that the recipe resizes are not decoded at full size before, whether their sizes are equal or not."""
    for i in range(12):
        (folder := tmp_path / f"class {i % 2}").mkdir(exist_ok=True)
        Image.new("L", (sides[i % len(sides)],) * 2, i).save(folder / f"{i}.png")
    decoded, decode_one = [], decode._decode_one

    def noting(files: decode.Encoded, resize: int | None, pixels: np.ndarray, index: int) -> object:
        decoded.append(files.name(index))
        return decode_one(files, resize, pixels, index)

    monkeypatch.setattr(decode, "_decode_one", noting)
    dataset, found = read_images(str(tmp_path), None)
    assert (dataset.resize, found.size) == (resized, (64, 64))
    assert len(decoded) == len(set(decoded)) == 12


def test_the_source_follows_from_the_files(tmp_path: Path) -> None:
    """Parquet files, official layouts and folders are recognised; a name is a name."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "train.parquet").touch()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "wnids.txt").touch()
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "owl").mkdir()
    (tmp_path / "birds" / "owl" / "1.png").touch()
    (tmp_path / "birds" / "facts.parquet").touch()
    for name in ("README.md", "banner.png", "data/train-00000-of-00001.parquet", ".cache/x/1.png"):
        for repository in ("hub", "hub with assets"):
            (place := tmp_path / repository / name).parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    (tmp_path / "hub with assets" / "assets").mkdir()
    (tmp_path / "hub with assets" / "assets" / "1.png").touch()
    (tmp_path / "two" / "owl").mkdir(parents=True)
    (tmp_path / "two" / "cat").mkdir(parents=True)
    for name in ("owl/1.png", "cat/1.png", "train.parquet"):
        (tmp_path / "two" / name).touch()
    (tmp_path / "capitals").mkdir()
    (tmp_path / "capitals" / "x.PARQUET").touch()
    revision = tmp_path / "datasets--a--b" / "snapshots" / "0123abc" / "data"
    revision.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "4567def").touch()
    (revision / "train-00000-of-00001.parquet").symlink_to("../../../blobs/4567def")
    hubs = {"hub": "parquet", "hub with assets": "parquet", "two": "folder", "datasets--a--b": "parquet"}
    hubs |= {"capitals": "parquet", "capitals/x.PARQUET": "parquet"}
    names = hubs | {"pages": "parquet", "pages/train.parquet": "parquet", "tiny": "tiny-imagenet", "birds": "folder"}
    assert {name: source_of(str(tmp_path / name)) for name in names} == names
    assert source_of("digits") == "digits"


def test_a_recipe_of_two_parquet_files_reads_them_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of TRAIN.parquet,TEST.parquet become absolute, even below a folder with a comma; the first names the run."""
    (folder := tmp_path / "cats, dogs").mkdir()
    for name, count in (("birds.parquet", 20), ("held-out.parquet", 6)):
        images = [b"P5 2 2 255\n" + bytes([i] * 4) for i in range(count)]
        pq.write_table(pa.table({"image": images, "label": [i % 2 for i in range(count)]}), folder / name)
    monkeypatch.chdir(folder)
    dataset, found = read_images("birds.parquet, held-out.parquet", None)
    assert dataset.path == f"{folder}/birds.parquet,{folder}/held-out.parquet"
    assert default_name("birds.parquet,held-out.parquet", 3) == "birds-ipc3"
    monkeypatch.chdir("/")
    again = load_raw(dataset.source, dataset.path)
    assert (again.fingerprint, len(again.test)) == (found.fingerprint, 6)
    assert read_images(f"{folder}/birds.parquet", None)[0].path == f"{folder}/birds.parquet"


def test_errors_of_files_are_explained_by_what_init_takes(tmp_path: Path) -> None:
    """Paths without images are errors whose remedies give a path first, and then the key of a recipe."""
    with zipfile.ZipFile(tmp_path / "tables.zip", "w") as archive:
        archive.writestr("train.parquet", "PAR1")
    (tmp_path / "table.pq").write_bytes(b"PAR1")
    (tmp_path / "two").mkdir()
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / "two" / name).touch()
    (tmp_path / "empty").mkdir()
    remedies = {
        "absent": "Give the path where the data set is",
        "absent.parquet": "Give the path (dataset.path) of a folder of Parquet files, one file, or TRAIN.parquet,",
        "tables.zip": "It holds Parquet files (1): unpack it, then give the folder of the Parquet files",
        "table.pq": "Give it a name that ends in .parquet",
        "two": "Give them names with the word 'train' in it, or the path TRAIN.parquet,TEST.parquet",
        "empty": "Check the path (dataset.path) and the layout below it",
    }
    for name, remedy in remedies.items():
        with pytest.raises(DatasetError) as caught:
            read_images(str(tmp_path / name), None)
        assert caught.value.remedy.startswith(remedy), name
