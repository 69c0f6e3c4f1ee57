# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all test-versions docs lint type fmt check bench-bfloat16 bench-cifar bench-evaluate bench-experts bench-labels bench-matching bench-metadd bench-methods bench-own-images bench-pad bench-plan bench-rounding bench-scaling bench-scheduling bench-store fidelity gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(VENV)/installed  ## create the virtual environment and install the package with its tools

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev,docs]'
	@# pip compiles on one core; some packages hold files that are no Python
	$(BIN)/python -m compileall -q -j 0 -x "/(tests?|examples?|rllib)/" $(VENV)/lib > /dev/null || true
	@touch $@

demo: install  ## experts, DATM at 1 and 10 images per class, evaluation and report on real digits
	$(BIN)/datm-ray run digits-ipc1 digits-ipc10 --out runs/demo

# Two processes, one thread each; Ray's tests share one of them and its cluster.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test: install  ## the tests that find most faults, in minutes
	$(PYTEST) -m "not slow"

test-slow: install  ## the other tests: lost nodes, jobs over HTTP, compiled variants, benchmarks
	$(PYTEST) -m "slow and not exhaustive"

test-all: install  ## all tests, also the exhaustive ones, which repeat others with many more cases
	$(PYTEST)

test-versions:  ## numeric tests and small runs at the versions of docs/versions.md: ROWS="lowest 2.11 2.14 highest"
	.ci/versions $(ROWS)

lint: install  ## style, and the words of docstrings, comments and messages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/words

type: install  ## types
	$(BIN)/mypy

docs: install  ## the documentation, into build/site; links and references must be right
	rm -rf build/pages && mkdir -p build/pages
	git ls-files -z -- '*.md' '*.ipynb' '*.png' '*.yaml' '*.json' '*.sh' '*.yml' 'cluster/*' 'datm_ray/*.py' 'datm_ray/*.j2' pyproject.toml \
	  | grep -zv '^tests/' | xargs -0 cp --parents -t build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .ci/mkdocs.yml

fmt: install  ## mend style where it can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint type docs test-all  ## all that must be green before a commit

bench-experts: install  ## experts an hour against the published loop
	$(BIN)/python benchmarks/bench_experts.py

bench-evaluate: install  ## networks scored an hour against the published loop
	$(BIN)/python benchmarks/bench_evaluate.py

bench-labels: install  ## bytes and speed of writing and playing back labels, against a pickle for each batch
	$(BIN)/python benchmarks/bench_labels.py

bench-methods: install  ## all ways to make a set under the same labels, on a part of CIFAR-10: CIFAR=folder of its Parquet files
	$(BIN)/python benchmarks/bench_methods.py $(if $(CIFAR),--cifar $(CIFAR))

bench-matching: install  ## speed, memory and error of the matching gradient against full unrolling and TESLA
	$(BIN)/python benchmarks/bench_matching.py

bench-cifar: install  ## DATM, MTT and controls on a part of CIFAR-10: CIFAR=folder of its Parquet files
	$(BIN)/python benchmarks/bench_cifar.py $(if $(CIFAR),--cifar $(CIFAR))

bench-metadd: install  ## accuracy on other architectures with and without MetaDD, its terms, and its cost
	$(BIN)/python benchmarks/bench_metadd.py

bench-pad: install  ## PAD's three parts, each alone and all together, against DATM without them, on digits
	$(BIN)/python benchmarks/bench_pad.py

bench-own-images: install  ## init and run on parts of CIFAR-10 and Tiny-ImageNet, nothing tuned: DATA=folder of their Parquet files
	$(BIN)/python benchmarks/bench_own_images.py $(if $(DATA),--data $(DATA))

bench-plan: install  ## what `plan` says against short runs: time and memory
	$(BIN)/python benchmarks/bench_plan.py

bench-bfloat16: install  ## CPU time in bfloat16 against float32, at the published size of CIFAR-10
	$(BIN)/python benchmarks/bench_bfloat16.py

bench-rounding: install  ## float32 error of the matching gradient over many problems
	$(BIN)/python benchmarks/bench_rounding.py

bench-scaling: install  ## strong and weak scaling of one distillation over 1, 2 and 4 processes, against the ideal
	$(BIN)/python benchmarks/bench_scaling.py

bench-scheduling: install  ## start-up, tasks, events and ranks on Ray, with workers that sleep
	$(BIN)/python benchmarks/bench_scheduling.py

bench-store: install  ## bytes on the wire and latency of reading two snapshots, local and S3
	$(BIN)/python benchmarks/bench_store.py

fidelity: install  ## start ranges against images per class, and an ablation, on digits: half an hour on two cores
	$(BIN)/python benchmarks/bench_fidelity.py

gpu:  ## a GPU in nine minutes: exactness, speed, memory, accuracy; needs torch, not Ray. DEVICE=cpu in small, CIFAR=folder of its Parquet files
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/bench_gpu.py $(if $(DEVICE),--device $(DEVICE)) $(if $(CIFAR),--cifar $(CIFAR)) $(if $(OUT),--out $(OUT))

clean:  ## remove the virtual environments, runs and caches
	rm -rf $(VENV) .venv-versions runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
