# Everything runs in a virtual environment that the first target to need it creates.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS = constraints.txt
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
# Where the composed package keeps the overlay's files.
OVERLAY = $(patsubst %,build/fork/%,$(shell git ls-files 'kornia/*.py' 2>/dev/null || find kornia -name '*.py'))

.PHONY: help demo two-stages evidence bench gpu test test-fast lint types pytest kernels fuzz coverage mutants doctest bench-smoke docs test-torch test-triton patch patch-test patch-times upstream-test clean

help:
	@echo "make demo        find lakes in photographs of the Earth, with cross-entropy alone and with Lovász beside it"
	@echo "make two-stages  cross-entropy first, a Lovász loss second, the best threshold last; on handwriting or your images"
	@echo "make evidence    compare losses seed by seed, hours; stop it and go on as you like; ARGS=--quick for two minutes"
	@echo "make bench       time, memory and accuracy beside Kornia 0.9.0 and cross-entropy"
	@echo "make gpu         on a machine with a card: the tests and the benchmark of the fused kernels"
	@echo "make test        the whole check: lint, types, tests, doctests, documentation"
	@echo "make test-fast   the tests of losses and metrics in float32, without the slow ones: a minute"
	@echo "make fuzz        the laws of the losses on many more inputs, drawn anew"
	@echo "make coverage    the tests of the losses and metrics, which must reach every line and branch"
	@echo "make mutants     break the losses on purpose, place by place, and list what no test notices; takes hours"
	@echo "make docs        the documentation, into docs/build/html"
	@echo "make test-torch TORCH=2.5.1   the tests alone, with another release of PyTorch"
	@echo "make test-triton TRITON=3.1.0   the kernels compiled by another release of Triton"
	@echo "make patch       the patch series for Kornia and the texts of its pull requests, into dist/upstream"
	@echo "make patch-test  the same, with the tests of each step on the tree that it leaves"
	@echo "make patch-times the times of the losses after each step, for those texts"
	@echo "make upstream-test KORNIA=<checkout>   Kornia's own tests on the release and on the fork, compared"
	@echo "make lint | types | pytest | doctest   one part of the check"
	@echo "make clean       remove what the other targets made"

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py $(ARGS)

two-stages: $(VENV)/installed
	$(BIN)/python examples/segment.py $(ARGS)

evidence: $(VENV)/installed
	$(BIN)/python examples/evidence.py $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/threshold.py

# Nothing is installed or fetched: the Python with PyTorch for the card is the machine's own.
GPU_PYTHON ?= $(PYTHON)
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

test: lint types pytest kernels doctest bench-smoke docs

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/flake8 kornia

types: $(VENV)/installed
	$(BIN)/ty check --python $(VENV) $(OVERLAY)

# One process for each core, each with one thread: threads of several processes would wait for each other.
pytest: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# The fused kernels for CUDA, on the CPU: Triton's interpreter runs them if it is told to before it is imported. It runs
# one thread at a time, and slowly: many pixels take minutes. Errors and transforms are not the kernels'.
INTERPRETED = not exception and not Compile and not Transforms and not Scale and not Sizes and not Laws and not threads
INTERPRETED += and not deterministic and not counts and not teacher and not large and not thousand and not accuracy
INTERPRETED += and not Group and not precision and not without_a_factor and not cardinality and not compatibility
INTERPRETED += and not gradcheck and not forms
kernels: $(VENV)/installed
	TRITON_INTERPRET=1 KORNIA_LOVASZ_KERNELS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal \
		tests/losses -m "not jit" -k "$(INTERPRETED)" --dtype float32 $(ARGS)

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests --dtype float32 \
		-k "not Scale and not Group and not Process and not Compiled" -m "not jit and not grad"

# Apart from `make test`, as it takes half as long again.
coverage: $(VENV)/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest tests
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

fuzz: $(VENV)/installed
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/losses/test_lovasz_properties.py $(ARGS)

# It changes the files of kornia/ one place at a time, and changes them back. What has run is kept.
mutants: $(VENV)/installed
	$(PIP) install -c $(CONSTRAINTS) --group mutants
	test -f build/mutants.sqlite || { $(BIN)/cosmic-ray init tests/mutants.toml build/mutants.sqlite && \
		$(BIN)/cr-filter-operators build/mutants.sqlite tests/mutants.toml; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cosmic-ray exec tests/mutants.toml build/mutants.sqlite
	$(BIN)/cr-report --surviving-only --show-diff build/mutants.sqlite

doctest: $(VENV)/installed
	$(BIN)/python -m pytest --doctest-modules $(OVERLAY)
	$(BIN)/python -m pytest --doctest-glob='*.rst' docs/source --ignore=docs/source/_generated --ignore=docs/source/recipe

# Everything the benchmark does, once, on tiny inputs: it must not rot between the runs that count.
bench-smoke: $(VENV)/installed
	$(BIN)/python benchmarks/run.py --smoke --out build/bench-smoke
	$(BIN)/python benchmarks/threshold.py --smoke --out build/bench-smoke
	$(BIN)/python benchmarks/your_data.py --smoke

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -b html docs/source docs/build/html

# torch alone first: it is pinned exactly, and nothing may pull another build of it.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS) fork/compose.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) "pip>=25.1"
	$(PIP) install -c $(CONSTRAINTS) torch numpy
	$(PIP) install -c $(CONSTRAINTS) -e . --group dev --group docs --group examples
	$(PIP) install -c $(CONSTRAINTS) --no-deps --target $(VENV)/peers --upgrade --group peers
	touch $@

# Another release of PyTorch gets an environment of its own. The examples and the documentation need newer ones.
test-torch:
	@test -n "$(TORCH)" || { echo "say which release: make test-torch TORCH=2.5.1"; exit 2; }
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	mkdir -p build && sed "s/^torch==.*/torch==$(TORCH)/; /^triton==/d" $(CONSTRAINTS) > build/constraints-torch-$(TORCH).txt
	.venv-torch-$(TORCH)/bin/python -m pip install -q -c build/constraints-torch-$(TORCH).txt "pip>=25.1"
	.venv-torch-$(TORCH)/bin/python -m pip install -q -c build/constraints-torch-$(TORCH).txt -e . --group dev
	.venv-torch-$(TORCH)/bin/python -m pytest tests fork

# The kernels compiled by another release of Triton; its interpreter can run them from 3.6 on.
test-triton: $(VENV)/installed
	@test -n "$(TRITON)" || { echo "say which release: make test-triton TRITON=3.1.0"; exit 2; }
	$(PIP) install --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest -n auto tests/losses/test_lovasz_kernels.py $(ARGS)

# KORNIA, a checkout of its repository, adds the lines of its documentation.
patch patch-test: $(VENV)/installed
	$(BIN)/python -m fork.patch $(if $(KORNIA),--kornia $(KORNIA)) $(if $(filter patch-test,$@),--test)

patch-times: $(VENV)/installed
	$(BIN)/python -m fork.step_times $(ARGS)

# More options of the script and of pytest in ARGS: --scope tests, --dtype float32.
upstream-test: $(VENV)/installed
	@test -n "$(KORNIA)" || { echo "give a checkout of Kornia: make upstream-test KORNIA=<folder>"; exit 2; }
	$(BIN)/python -m fork.upstream_test $(KORNIA) $(ARGS)

clean:
	rm -rf $(VENV) .venv-torch-* build dist docs/build docs/source/_generated docs/source/recipe demo-output
