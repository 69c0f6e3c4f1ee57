"""Tests that a finished set can go on for more iterations, with the bits of a run that had them from the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datm_ray
from datm_ray.config import RunConfig, override, run_identity, to_yaml
from datm_ray.errors import ConfigError, DatmError, RunDirectoryError
from datm_ray.pipeline.folder import continue_set
from datm_ray.stages.distill.checkpoint import CHECKPOINT, read_curves
from datm_ray.stages.distill.task import COST, INITIAL, SYNTHETIC
from datm_ray.store.files.filesystem import Location, open_location
from tests.conftest import CommandLine, tiny_config

SERIAL: Any = {"executor": "serial", "progress": False}


def of_length(iterations: int, name: str, *changes: str) -> RunConfig:
    return tiny_config(f"name={name}", f"distill.iterations={iterations}", "distill.validate_every=2", *changes)


def distilled(out: Path, config: RunConfig) -> Any:
    datm_ray.train_experts(config, str(out), **SERIAL)
    return datm_ray.distill(config, str(out), **SERIAL)


def going_on(out: Path, *changes: str) -> RunConfig:
    return of_length(6, "long", f"distill.continue_from={out / 'short'}", *changes)


@pytest.mark.parametrize("method", ["datm", "dm"])
def test_a_longer_run_continues_with_the_same_bits(method: str, tmp_path: Path) -> None:
    """A set that continues from a shorter run equals the set of one long run, with its curves, bit for bit."""
    distilled(tmp_path, of_length(4, "short", f"method={method}"))
    long = distilled(tmp_path, going_on(tmp_path, f"method={method}"))
    whole = distilled(tmp_path, of_length(6, "whole", f"method={method}"))
    assert torch.equal(long.images, whole.images)
    assert torch.equal(long.soft_labels, whole.soft_labels)
    assert long.step_sizes == whole.step_sizes
    curves = [read_curves(open_location(str(tmp_path / name))) for name in ("long", "whole")]
    assert curves[0]["history.iteration"].tolist() == list(range(6))
    for name, values in curves[0].items():
        np.testing.assert_array_equal(values, curves[1][name], name)
    for name in (INITIAL, SYNTHETIC):
        assert torch.equal(*(datm_ray.load(tmp_path / run / name).images for run in ("long", "whole")))
    assert (tmp_path / "short" / SYNTHETIC).exists()


def test_the_run_that_continues_is_named_and_resumes(datm_ray: CommandLine, tmp_path: Path) -> None:
    """The command says from where it continues; a later command resumes its own state and not that of the short run."""
    out = tmp_path / "runs"
    distilled(out, of_length(4, "short"))
    path = tmp_path / "long.yaml"
    path.write_text(to_yaml(going_on(out)))
    code, _, shown = datm_ray("distill", str(path), "-o", str(out), "--executor", "serial")
    assert code == 0
    assert f"long: continues from iteration 4 of {out / 'short'}" in shown
    (out / "long" / SYNTHETIC).unlink()
    code, _, shown = datm_ray("distill", str(path), "-o", str(out), "--executor", "serial")
    assert code == 0
    assert "continues from" not in shown


def test_a_set_continues_once_and_then_needs_no_source(tmp_path: Path) -> None:
    """A run that has the state of the shorter run, or is finished, needs the shorter run no more."""
    distilled(tmp_path, of_length(4, "short"))
    long = distilled(tmp_path, going_on(tmp_path))
    (tmp_path / "short").rename(tmp_path / "away")
    assert torch.equal(distilled(tmp_path, going_on(tmp_path)).images, long.images)
    (tmp_path / "long" / SYNTHETIC).unlink()
    assert torch.equal(distilled(tmp_path, going_on(tmp_path)).images, long.images)


def test_a_validation_that_one_long_run_lacks_is_reported(
    tmp_path: Path, datm_ray: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says that the last set is a further candidate if validations do not divide the iterations."""
    out, path = tmp_path / "runs", tmp_path / "long.yaml"
    distilled(out, of_length(3, "short", "method=dm"))
    path.write_text(to_yaml(going_on(out, "method=dm")))
    _, _, shown = datm_ray("distill", str(path), "-o", str(out), "--executor", "serial")
    assert "the set of iteration 3 was validated too" in shown


def test_a_cut_off_copy_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that ends after its first part leaves neither a state nor a cost, and the next command copies again."""
    distilled(tmp_path, of_length(4, "short"))
    config, folder = going_on(tmp_path), open_location(str(tmp_path / "long"))
    copied = []

    def cut_off(self: Location, content: bytes) -> None:
        copied.append(self)
        if len(copied) == 3:
            raise KeyboardInterrupt
        write(self, content)

    write = Location.write_atomic
    monkeypatch.setattr(Location, "write_atomic", cut_off)
    with pytest.raises(KeyboardInterrupt):
        continue_set(config, folder)
    monkeypatch.setattr(Location, "write_atomic", write)
    assert not {CHECKPOINT, COST} & set(folder.list())
    assert continue_set(config, folder) == 4
    assert continue_set(config, folder) is None


def test_experts_of_other_weights_cannot_continue_a_set(tmp_path: Path) -> None:
    """A shorter run whose experts had other weights than those in this run's store is refused."""
    distilled(tmp_path, of_length(4, "short"))
    note = tmp_path / "short/dataset.json"
    content = json.loads(note.read_text())
    assert content["experts"]
    note.write_text(json.dumps(content | {"experts": dict.fromkeys(content["experts"], "00000000")}))
    with pytest.raises(RunDirectoryError, match="the weights of its experts"):
        datm_ray.distill(going_on(tmp_path), str(tmp_path), **SERIAL)


def test_the_place_of_the_shorter_run_is_no_part_of_a_result(tmp_path: Path) -> None:
    """A run that continues has the identity of a run of its length."""
    assert run_identity(going_on(tmp_path)) == run_identity(of_length(6, "long"))


REFUSED: dict[str, tuple[list[str], type[DatmError], str]] = {
    "no run": (["distill.continue_from=nowhere"], RunDirectoryError, "holds no finished run"),
    "other settings": (["distill.threshold=0.5"], RunDirectoryError, "it differs in distill.threshold"),
    "another seed": (["seed=1"], RunDirectoryError, "it differs in seed"),
    "no more iterations": (["distill.iterations=4"], ConfigError, "has 4 iterations, and distill.iterations is 4"),
}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run of 4 iterations."""
    out = tmp_path_factory.mktemp("short")
    distilled(out, of_length(4, "short"))
    return out


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_before_anything_is_written(case: str, short_run: Path) -> None:
    """A run with other settings, images or no more iterations is refused, with what differs; nothing is written."""
    changes, error, expected = REFUSED[case]
    with pytest.raises(error, match=expected):
        datm_ray.distill(override(going_on(short_run), changes), str(short_run), **SERIAL)
    assert not (short_run / "long").exists()


def test_a_damaged_or_missing_state_is_refused(tmp_path: Path) -> None:
    """A finished run whose checkpoint is gone cannot go on."""
    distilled(tmp_path, of_length(4, "short"))
    (tmp_path / "short" / CHECKPOINT).unlink()
    with pytest.raises(RunDirectoryError, match="holds no finished run"):
        datm_ray.distill(going_on(tmp_path), str(tmp_path), **SERIAL)
