# make pretrain    text -> shards -> training -> Hugging Face folder -> report, on whatever hardware there is
# make recall      a small model that learns to recall facts by its memory, evaluated, with a report, and ready to be asked
# make study       the study in small: a grid of runs, evaluated, with one report; half an hour on two cores
# make gpu         checks and measures what this machine's GPU gives, in ten minutes; ARGS="--device cpu": in small, without one
# make test        the whole test suite
# make test-transformers  the model's tests with the oldest and the newest transformers 5; TRANSFORMERS=5.24.0: with this one
# make test-slurm  the job script, on the Slurm of two nodes that SLURM_CONF names
PYTHON ?= python3
# Options for launch/quickstart.py, launch/study.py, launch/gpu.py or pytest, such as ARGS="steps=500" or ARGS="-k memory".
ARGS ?=
INSTALLED := .venv/.installed

.PHONY: pretrain recall study gpu test test-transformers test-slurm lint format lock clean

pretrain: $(INSTALLED)
	@.venv/bin/python launch/quickstart.py $(ARGS)

recall: $(INSTALLED)
	@.venv/bin/python launch/quickstart.py --recall $(ARGS)

study: $(INSTALLED)
	@.venv/bin/python launch/study.py launch/studies/small.yaml $(ARGS)

gpu: $(INSTALLED)
	@.venv/bin/python launch/gpu.py $(ARGS)

test: $(INSTALLED)
	@.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# TRANSFORMERS: versions such as "5.0.0 5.24.0", or "newest" for the newest 5 of the package index.
TRANSFORMERS ?= 5.0.0 newest
TRANSFORMERS_TESTS ?= tests/model tests/conversion/test_transformers_versions.py tests/conversion/test_export.py

test-transformers: $(INSTALLED)
	@tests/support/test_transformers.sh "$(TRANSFORMERS)" $(TRANSFORMERS_TESTS) $(ARGS)

test-slurm: $(INSTALLED)
	@.venv/bin/python -m pytest -s tests/slurm/check_jobs.py $(ARGS)

lint: $(INSTALLED)
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@.venv/bin/python -m codespell_lib

format: $(INSTALLED)
	@.venv/bin/python -m ruff check --fix .
	@.venv/bin/python -m ruff format .

# torch first and alone, since its own dependencies differ from machine to machine; then everything else, exactly as
# locked; then the project itself, editable. -qq: errors alone, not pip's remarks on how packages are built. The lock leaves out what mosaicml-streaming asks for and nothing here uses: torchvision and the cloud SDKs.
$(INSTALLED): requirements.lock setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is older than Python 3.10; give another one: make PYTHON=python3.11" >&2; exit 2; }
	@echo "=== installing into .venv (two to three minutes)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements.lock
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Needs `uv`. lock-overrides.txt says what is left out.
lock:
	uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --no-emit-index-url \
	    --overrides lock-overrides.txt --extra test setup.cfg -o requirements.lock \
	    $(foreach package,$(OF_TORCH),--no-emit-package $(package))

# What torch brings along itself, most of it for CUDA builds only.
OF_TORCH := cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
    nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
    nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx triton setuptools

clean:
	rm -rf .venv
