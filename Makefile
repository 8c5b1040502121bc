# Two commands do everything on a Debian machine with Python 3.11, gcc and make:  make demo   and   make test.
# TORCH is installed first and alone, so that pip takes the build this machine's pip configuration offers.
PYTHON ?= python3.11
TORCH  := torch==2.13.0
JOBS   ?= 2
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: help venv demo demo-targets test nightly bench gpu-report onnx-suite lint types docs clean
.DEFAULT_GOAL := help

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(READY)  ## the environment (.venv, editable install); does nothing when it is up to date

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "bitwright needs $(PYTHON): apt-get install python3.11 python3.11-venv" >&2; exit 2; }
	@command -v gcc >/dev/null || { echo "bitwright links programs with the C compiler: apt-get install gcc" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	echo "$(TORCH)" > $(VENV)/constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[dev,demo]"
	touch $@

demo: $(READY)  ## train, compress, compile and measure a small CNN and MiniLM; writes demo-out/*.html
	$(PY) examples/demo.py

demo-targets: $(READY)  ## one network on this machine, as C on other processors (emulated) and on paper devices
	$(PY) examples/targets.py

test: $(READY)  ## the test suite, without the nightly sweeps
	$(PY) -m pytest -n $(JOBS) -m "not nightly"

nightly: $(READY)  ## the slow sweeps: all architectures, 2,000 random graphs compiled against the reference
	$(PY) -m pytest -n $(JOBS) -m nightly
	BITWRIGHT_RANDOM_GRAPHS=2000 $(PY) -m pytest -n $(JOBS) tests/test_random_graphs.py

onnx-suite: $(READY)  ## the ONNX backend suite; prints how many cases pass, refuse, fail
	$(PY) benchmarks/onnx_suite.py --executor compiled

bench: $(READY)  ## side-by-side measurements against peers; results in benchmarks/results (about 40 minutes on 2 idle cores)
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[bench]" \
	  || echo "peers that pip could not install are left out: each has its line in the results"
	$(PY) benchmarks/bench.py

gpu-report: $(READY)  ## GPU kernels, networks, a training step: compiled here; checked and timed where a device is
	$(PY) benchmarks/gpu.py --prepare gpu-report.zip
	$(PY) benchmarks/gpu_models.py --prepare gpu-models
	$(PY) benchmarks/gpu_training.py --prepare gpu-training
	$(PY) benchmarks/gpu.py gpu-report.zip --results benchmarks/results/gpu.json
	$(PY) benchmarks/gpu_models.py gpu-models
	$(PY) benchmarks/gpu_training.py --kernels gpu-training

lint: $(READY)  ## ruff, mypy, import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

docs: $(READY)  ## regenerate docs/passes.md, targets.md, ops.md
	$(PY) docs/generate.py

clean:  ## remove build products, keep the environment
	rm -rf build dist demo-out *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
