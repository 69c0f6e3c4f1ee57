"""Commands that list, check, delete, import and export what a store holds: experts, teachers and priors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datm_ray.cli.ending import say
from datm_ray.cli.options import ExpertsOf, IntoStore, Invocation, Json, Set, Verbose, WriteTo, config_of, print_json
from datm_ray.words import counted, data_size

if TYPE_CHECKING:
    from datm_ray.store.trajectories import ExpertGroup

store_app = typer.Typer(
    help="Inspect, check, import and export stored experts.", no_args_is_help=True, rich_markup_mode=None
)

StoreUri = Annotated[str, typer.Argument(metavar="URI", help="Trajectory store: a local path, file:// or s3:// URI.")]
Group = Annotated[
    str, typer.Argument(metavar="DATASET/ARCHITECTURE/FINGERPRINT", help="A group of experts, as `store ls` names it.")
]


@store_app.command("ls")
def store_ls(uri: StoreUri, json_: Json = False) -> None:
    """List the groups of experts in a store, and its priors.

    Each line has the number of experts, the stored epochs, their precision and their size.
    """
    from datm_ray.store.trajectories import epochs_in_words

    found = [_group_facts(group) for group in _groups(uri, unfinished=True)]
    if json_:
        print_json(found)
        return
    for facts in found:
        if facts["prior"]:
            kept = f"a trained prior, {data_size(facts['bytes'])}"
        elif not facts["experts"]:
            kept = "no expert yet, training in progress or given up (`store rm` deletes the unfinished files)"
        else:
            stored = f"{epochs_in_words(facts['epochs'])}, {facts['storage']}"
            stored = "damaged, see `datm-ray store verify`" if facts["epochs"] is None else stored
            kept = f"{counted(len(facts['experts']), 'expert')}, {stored}, {data_size(facts['bytes'])}"
        print(f"{facts['group']}  {kept}")


def _group_facts(group: ExpertGroup) -> dict[str, Any]:
    """Group's key, numbers of its experts, epochs and precision that they store, presence of a prior, size in bytes.

    Epochs and precision are `None` if the group has no expert, or if its first expert is damaged.
    """
    from datm_ray.errors import CorruptFileError
    from datm_ray.store.trajectories import PRIOR_FILE

    numbers, info = group.experts(), None
    with suppress(CorruptFileError):
        info = group.read_info(numbers[0]) if numbers else None
    return {
        "group": str(group.key),
        "experts": list(numbers),
        "epochs": list(info.epochs) if info else None,
        "storage": info.storage if info else None,
        "prior": PRIOR_FILE in group.other_files(),
        "bytes": _bytes(group, numbers),
    }


def _bytes(group: ExpertGroup, numbers: Iterable[int]) -> int:
    """Size in bytes of the experts with these numbers together with the group's prior, if it has one."""
    from datm_ray.store.trajectories import PRIOR_FILE

    prior = group.location / PRIOR_FILE
    return sum(group.size(number) for number in numbers) + (prior.size() if prior.exists() else 0)


@store_app.command("show")
def store_show(uri: StoreUri, json_: Json = False) -> None:
    """Show the recipe, epochs, loss and size of every expert."""
    if json_:
        print_json([_expert_facts(group, number) for group in _groups(uri) for number in group.experts()])
        return
    for group in _groups(uri):
        print(group.key)
        for place, number in enumerate(group.experts()):
            print("\n".join(_expert_lines(_expert_facts(group, number), with_recipe=place == 0)))


def _expert_facts(group: ExpertGroup, number: int) -> dict[str, Any]:
    """What `store show` prints about an expert, by name. For a damaged expert: only group, number and damage."""
    from datm_ray.errors import CorruptFileError

    facts: dict[str, Any] = {"group": str(group.key), "expert": number, "damage": None}
    try:
        info, progress = group.read_info(number), group.read_progress(number)
    except CorruptFileError as failure:
        return facts | {"damage": failure.fact}
    return facts | {
        "parameters": info.parameter_count,
        "buffers": info.buffer_count,
        "storage": info.storage,
        "format": info.format_version,
        "recipe": info.recipe,
        "epochs": list(progress.epochs),
        "train_loss": float(progress.train_loss[-1]),
        "test_accuracy": float(progress.test_accuracy[-1]),
        "bytes": group.size(number),
    }


def _expert_lines(facts: Mapping[str, Any], *, with_recipe: bool) -> list[str]:
    """Lines about an expert from `_expert_facts`, with its group's recipe first if asked."""
    import math

    from datm_ray.store.trajectories import epochs_in_words

    expert = f"  expert {facts['expert']:>5}"
    if facts["damage"]:
        return [f"{expert}: damaged: {facts['damage']}"]
    lines, recipe = [], facts["recipe"]
    if with_recipe:
        buffers = f"   buffers {facts['buffers']:,}" if facts["buffers"] else ""
        lines.append(f"  parameters {facts['parameters']:,}{buffers}   {facts['storage']}   format {facts['format']}")
        for section, values in recipe.items():
            values = values if isinstance(values, dict) else {"": values}
            lines.append(f"  {section}: {', '.join(f'{name}={value}' for name, value in values.items())}")
    result = "imported" if "imported" in recipe else f"final train loss {facts['train_loss']:.4f}"
    if math.isfinite(facts["test_accuracy"]):
        result += f", test accuracy {facts['test_accuracy']:.4f}"
    return [*lines, f"{expert}: {epochs_in_words(facts['epochs'])}, {result}, {data_size(facts['bytes'])}"]


@store_app.command("verify")
def store_verify(uri: StoreUri, json_: Json = False, verbose: Verbose = 0) -> None:
    """Check every file of a store against its checksums.

    The command reads every byte of the experts, of their transforms, of the scores that order images and of priors,
    eight files at a time. It holds at most one snapshot of each file in memory.
    """
    from concurrent.futures import ThreadPoolExecutor

    from datm_ray.errors import CorruptFileError

    files: list[tuple[ExpertGroup, int | str | None]] = []
    for group in _groups(uri, unfinished=True):
        experts = group.experts()
        files += [(group, file) for file in (*experts, *([None] if experts else []), *group.other_files())]
    with ThreadPoolExecutor(8, "verify") as threads:
        found = list(threads.map(lambda file: _verified(*file), files))
    checked, others = (sum(isinstance(file, kind) for _, file in files) for kind in (int, str))
    size = sum(size for size, _ in found)
    damaged = [
        {"group": str(group.key), "file": _name(group, file), "damage": complaint}
        for (group, file), (_, complaint) in zip(files, found, strict=True)
        if complaint
    ]
    if json_:
        print_json({"experts": checked, "other_files": others, "bytes": size, "damaged": damaged})
    elif damaged:
        print("\n".join(each["damage"] for each in damaged))
    else:
        more = f" and {counted(others, 'other file')}" if others else ""
        print(f"whole: {counted(checked, 'expert')}{more}, {data_size(size)}")
    if damaged:
        raise CorruptFileError(
            f"{len(damaged)} of the files in {uri} are damaged or missing; the first: {damaged[0]['damage']}",
            remedy="restore copies, or delete them (`datm-ray store rm`) and run the step that wrote them again",
        )


def _name(group: ExpertGroup, file: int | str | None) -> str:
    """Name of a file in the group's folder: of an expert by its number, of the transform for `None`, else `file`."""
    if isinstance(file, str):
        return file
    return (group.transform_file if file is None else group.expert_file(file)).path.rpartition("/")[2]


def _verified(group: ExpertGroup, file: int | str | None) -> tuple[int, str]:
    """Check a group's file by its checksums. Returns its size in bytes, and a description of its damage or "".

    Args:
        file: number of an expert, or name of another file; `None` for the transform, whose size is given as 0.

    Raises:
        StoreError: the file cannot be read, so it is not known whether it is damaged.
    """
    from datm_ray.errors import CorruptFileError
    from datm_ray.store.files.filesystem import MissingFileError

    size = 0
    try:
        if file is None:
            group.read_transform()
        elif isinstance(file, str):
            size = (group.location / file).size()
            group.verify_other(file)
        else:
            size = group.size(file)
            group.verify(file)
    except (CorruptFileError, MissingFileError) as failure:
        return size, f"{failure.fact}. {failure.cause}"
    return size, ""


@store_app.command("rm")
def store_rm(
    uri: StoreUri,
    group: Group,
    expert: Annotated[
        list[int] | None,
        typer.Option("--expert", metavar="N", help="Delete only this expert. May be repeated."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it, only print what would be deleted.")] = False,
    verbose: Verbose = 0,
) -> None:
    """Delete experts, a group with its transform, or a prior."""
    from datm_ray.errors import StoreError
    from datm_ray.store.trajectories import PRIOR_FILE

    found = _group(uri, group, unfinished=True)
    numbers = sorted(set(expert or found.experts()))
    absent = set(numbers) - set(found.experts())
    if absent:
        raise StoreError(f"{group} has no expert {min(absent)}", remedy=f"`datm-ray store show {uri}` names them")
    size = data_size(_bytes(found, numbers))
    rest = "" if expert else ", their transform and what is in progress"
    what = f"{counted(len(numbers), 'expert')} of {found.location.uri}{rest}, {size}"
    if PRIOR_FILE in found.other_files():
        what = f"the prior {found.location.uri}, {size}"
    if not yes:
        print(f"Would delete {what}. Nothing was deleted; --yes deletes.")
        return
    if expert:
        for number in numbers:
            found.remove_expert(number)
    else:
        found.remove()
    print(f"Deleted {what}.")


@store_app.command("import")
def store_import(
    files: Annotated[list[str], typer.Argument(metavar="FILE.pt...", help="Files replay_buffer_*.pt of MTT.")],
    recipe: ExpertsOf,
    store: IntoStore,
    set_: Set = None,
    verbose: Verbose = 0,
) -> None:
    """Store expert trajectories of other projects for a recipe."""
    config = config_of(recipe, set_)
    from datm_ray.interop.replay_buffers import import_replay_buffers

    imported = list(import_replay_buffers(files, config, store))  # imports all before a print that may fail
    for each in imported:
        print(f"{each.group} expert {each.expert}" + ("" if each.new else " was there already"))
    new = sum(each.new for each in imported)
    accuracy = imported[0].accuracy
    if accuracy is not None:
        share = f"{accuracy.share:.1%} of {accuracy.images:,}"
        print(f"The last epoch of the first one classifies {share} test images correctly")
        if accuracy.is_guessing:
            say(
                f"the experts are no better than guessing one of {accuracy.classes} classes. "
                "The recipe normalises images otherwise than their program did, or its classes have another order. "
                f"Try: `datm-ray store rm {store} {imported[0].group}`, then import with another dataset.normalisation."
            )
    print(f"{new} trajectories were stored in {store}, {len(imported) - new} were there already")
    count = min(len(_group(store, group).experts()) for group in {each.group for each in imported})
    settings = [*(set_ or []), f"experts.count={count}"]
    print(f"Next: {Invocation([recipe], settings, 'runs', store).next('distill')}")


@store_app.command("import-teacher")
def store_import_teacher(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A state_dict: .pth, .pt or .safetensors.")],
    recipe: ExpertsOf,
    store: IntoStore,
    set_: Set = None,
    verbose: Verbose = 0,
) -> None:
    """Store a trained classifier, such as torchvision's.

    sre2l, select, MetaDD and labels then use it instead of training a network. The recipe must give the dataset.mean
    and dataset.std with which the classifier was trained.
    """
    config = config_of(recipe, set_)
    from datm_ray.interop.teachers import import_teacher

    imported = import_teacher(file, config, store)
    print(f"{imported.group} expert {imported.expert}")
    accuracy = imported.accuracy
    print(f"The network classifies {accuracy.share:.1%} of {accuracy.images:,} test images correctly")
    if accuracy.is_guessing:
        say(
            f"the network is no better than guessing one of {accuracy.classes} classes. "
            "Its classes have another order, or dataset.mean and dataset.std are not those of its training. "
            f"Try: `datm-ray store rm {store} {imported.group} --expert {imported.expert}`, "
            "then import it with a recipe that fits."
        )
    print(f"Next: {Invocation([recipe], set_, 'runs', store).next('run')}")


@store_app.command("export")
def store_export(
    uri: StoreUri,
    group: Group,
    out: WriteTo,
    per_file: Annotated[int, typer.Option("--per-file", metavar="N", min=1, help="Write N experts to each file.")] = 10,
    verbose: Verbose = 0,
) -> None:
    """Write a group's experts as replay_buffer_<n>.pt files.

    MTT and methods derived from it read these files.
    """
    from datm_ray.store.files.filesystem import open_location

    found = _group(uri, group)
    from datm_ray.interop.replay_buffers import export_replay_buffers
    from datm_ray.store.trajectories import epochs_in_words

    open_location(out).require_writable()
    exported = export_replay_buffers(found, open_location(out), per_file)
    print(f"Wrote {counted(len(exported.files), 'file')} to {out}")
    if exported.without_statistics:
        print("Without the running statistics of batch norms, which a replay buffer cannot hold")
    if exported.padded_otherwise:
        print("Warning: the published ConvNet pads images of one channel by 3 pixels, ours by 1: it is another network")
    if exported.left_out:
        left_out = epochs_in_words(exported.left_out)
        print(f"Without {left_out}, which come after a gap: a buffer's positions are its epochs")


def _groups(uri: str, *, unfinished: bool = False) -> list[ExpertGroup]:
    """Groups of experts of a store.

    Args:
        unfinished: True to include groups without a finished expert, such as groups of priors.

    Raises:
        MissingExpertsError: the store has no such groups.
    """
    from datm_ray.errors import MissingExpertsError
    from datm_ray.store.files.filesystem import open_location
    from datm_ray.store.trajectories import TrajectoryStore

    store = TrajectoryStore(uri)
    keys = store.groups(unfinished=unfinished)
    if not keys:
        inside = open_location(uri) / "experts"
        if inside.exists() and TrajectoryStore(inside.uri).groups(unfinished=unfinished):
            raise MissingExpertsError(f"{uri} is a folder of runs", remedy=f"give its store, {inside.uri}")
        raise MissingExpertsError(
            f"{uri} holds no experts", "the path is wrong, or nothing was trained yet", "run `datm-ray experts RECIPE`"
        )
    return [store.group(key.dataset, key.architecture, key.fingerprint) for key in keys]


def _group(uri: str, name: str, *, unfinished: bool = False) -> ExpertGroup:
    from datm_ray.errors import StoreError

    found = {str(group.key): group for group in _groups(uri, unfinished=unfinished)}
    if name not in found:
        raise StoreError(f"{uri} has no group {name}", remedy=f"it has {', '.join(found)}")
    return found[name]
