"""Does a finished set fit its own experts alone? Its matching loss from their starts, and from those of other experts.

python benchmarks/bench_unseen.py RUN --store STORE --group GROUP --experts 0 1 --others 4 5 --others-of GROUP

RUN is the folder of a finished run that matches trajectories, and groups are named as in `datm-ray store ls STORE`. The
other experts are trained alike but were not used, such as those of a larger `experts.count`. A start has one draw of
augmentations that no iteration of the run had. Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.artifact import load
from datm_ray.config import RunConfig
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.errors import DatmError
from datm_ray.methods.trajectory.matching import draw_student_steps, matching_gradient, place_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.pipeline.folder import read_recipe
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.trajectories import ExpertGroup, TrajectoryStore

UNDIFFERENTIATED = -1.0
"""Threshold of `matching_gradient` that every loss exceeds, so that no gradient is computed."""


@dataclass(frozen=True)
class Losses:
    """Matching losses of a set."""

    config: RunConfig
    synthetic: SyntheticSet
    functions: StudentStepFunctions

    @classmethod
    def of_run(cls, run: str) -> Losses:
        """Make the `Losses` of the set in a run's folder."""
        config, artifact = read_recipe(open_location(run)), load(f"{run}/synthetic.arrow")
        assert config is not None, f"{run} is no folder of a run"
        channels, height, width = artifact.images.shape[1:]
        spec = config.network.for_images(channels, (height, width), len(artifact.class_names))
        functions = StudentStepFunctions(FlatNetwork(build_network(spec, 0)), StepOptions())
        step_sizes = torch.tensor(artifact.step_sizes)
        return cls(config, SyntheticSet(artifact.images, artifact.soft_labels, step_sizes, artifact.labels), functions)

    def of(self, group: ExpertGroup, expert: int, start: int) -> float:
        """Loss from a start epoch of an expert."""
        settings = self.config.distill
        first, last = group.read_params(expert, [start, start + settings.expert_epochs])
        iteration = settings.iterations + 1000 * expert + start
        sizes = (len(self.synthetic.images), settings.student_steps, settings.batch_size)
        steps = draw_student_steps(*sizes, settings.augmentation, self.config.seed, iteration)
        start_and_target = (torch.from_numpy(np.array(each)) for each in (first, last))
        placed = place_steps(steps, None, self.synthetic.images)
        gradient = matching_gradient(
            self.functions, *start_and_target, self.synthetic, placed, skip_above=UNDIFFERENTIATED
        )
        return gradient.loss

    def of_all(self, group: ExpertGroup, experts: Sequence[int], starts: Sequence[int]) -> NDArray[np.float64]:
        """Losses, a row for each expert and a column for each start epoch."""
        return np.array([[self.of(group, expert, start) for start in starts] for expert in experts])


def line(title: str, losses: NDArray[np.float64]) -> str:
    """Line of the table: means over experts for each start epoch, and the mean over all."""
    means = [*losses.mean(axis=0), losses.mean()]
    return f"| {title} (n = {len(losses)}) | {' | '.join(f'{mean:.2f}' for mean in means)} |"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--store", required=True, help="store of the experts")
    parser.add_argument("--group", required=True, help="group of the run's experts: data set/architecture/fingerprint")
    parser.add_argument("--experts", type=int, nargs="+", required=True, help="numbers of some of the run's experts")
    parser.add_argument("--others", type=int, nargs="+", required=True, help="numbers of experts that it did not use")
    parser.add_argument("--others-of", help="their group; the run's own unless given")
    parser.add_argument("--starts", type=int, nargs="+", required=True, help="start epochs")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    try:
        losses, store = Losses.of_run(given.run), TrajectoryStore(given.store)
        own, others = (store.group(*name.split("/")) for name in (given.group, given.others_of or given.group))
        rows = {
            "experts it was made with": losses.of_all(own, given.experts, given.starts),
            "others": losses.of_all(others, given.others, given.starts),
        }
    except DatmError as failure:
        sys.exit(f"bench_unseen: {failure}")
    print(f"| start epoch | {' | '.join(map(str, given.starts))} | mean |\n{'| --- ' * (len(given.starts) + 2)}|")
    print("\n".join(line(title, found) for title, found in rows.items()))


if __name__ == "__main__":
    main()
