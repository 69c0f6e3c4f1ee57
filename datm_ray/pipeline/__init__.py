"""A run from recipe to report: which stages there are, what each needs, and what is already done.

An output folder holds any number of runs that share experts and controls (scores of real images). Among its files are:

    <out>/experts/                the trajectory store, unless another one is given
    <out>/<run>/recipe.yaml       the run's configuration
    <out>/<run>/log.txt           log of its commands, see `monitor/logs.py`
    <out>/<run>/dataset.json      fingerprint and size of its data set, origin of its experts
    <out>/<run>/experts-cost.json cost of its experts, copied from the store
    <out>/<run>/*.arrow           the set and its checkpoint, see `stages/distill/task.py`
    <out>/<run>/evaluation/       scores of its set, one JSON file per row of the accuracy table and seed
    <out>/<run>/scoring.json      how networks of the row "distilled" were trained, see `artifact.py`
    <out>/transforms/             large transforms, such as whitening, once for all runs; see `artifact.py`
    <out>/controls/               scores of training on real images, shared by runs
    <out>/report.html             the report over all runs
    <out>/summary.json            the numbers of the report

A stage is a list of tasks; a task whose result exists is skipped. So running the same command again resumes where it
stopped, for whatever reason it stopped.
"""

from datm_ray.pipeline.checks import require_together
from datm_ray.pipeline.folder import publish, report, summaries
from datm_ray.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "publish", "report", "require_together", "summaries"]
