# Everything runs in a virtual environment. The first target that needs it creates it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS = constraints.txt
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
# Paths of this fork's files (the overlay) in the composed package, which is Kornia's release with these files on top.
OVERLAY = $(patsubst %,build/fork/%,$(shell git ls-files 'kornia/*.py' 2>/dev/null || find kornia -name '*.py'))

.PHONY: help demo two-stages evidence bench gpu test test-fast lint types pytest kernels fuzz coverage mutants doctest bench-smoke docs test-torch test-triton patch patch-test patch-times upstream-test clean

help:
	@echo "make demo        train two networks to find lakes in photographs: cross-entropy alone, and cross-entropy + Lovász"
	@echo "make two-stages  train with cross-entropy, then a Lovász loss, on digits or your images; find the best threshold"
	@echo "make evidence    compare losses over several seeds; takes hours, can be resumed; ARGS=--quick takes two minutes"
	@echo "make bench       measure time, memory and accuracy, compared with Kornia 0.9.0 and cross-entropy"
	@echo "make gpu         test and benchmark the fused kernels, on a machine with a GPU"
	@echo "make test        run all checks: lint, types, tests, doctests, a short benchmark, documentation"
	@echo "make test-fast   run the tests of losses and metrics in float32, without the slow ones; takes a minute"
	@echo "make fuzz        run the property tests of the losses on many more random inputs"
	@echo "make coverage    run the tests of losses and metrics, and check how much of the code they reach"
	@echo "make mutants     break the losses in one place at a time, and list the changes that no test detects; takes hours"
	@echo "make docs        build the documentation in docs/build/html"
	@echo "make test-torch TORCH=2.5.1   run the tests with another release of PyTorch"
	@echo "make test-triton TRITON=3.1.0   run the kernel tests with another release of Triton"
	@echo "make patch       write the patch series for Kornia and its pull-request texts to dist/upstream"
	@echo "make patch-test  the same, and run the tests after each patch"
	@echo "make patch-times measure the time of the losses after each patch, for the pull-request texts"
	@echo "make upstream-test KORNIA=<checkout>   run Kornia's tests on the release and on the fork, and compare the results"
	@echo "make lint | types | pytest | kernels | doctest   run one part of 'make test'"
	@echo "make clean       remove everything that the other targets created"

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py $(ARGS)

two-stages: $(VENV)/installed
	$(BIN)/python examples/segment.py $(ARGS)

evidence: $(VENV)/installed
	$(BIN)/python examples/evidence.py $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/threshold.py

# Uses the Python of the machine, which must have PyTorch for its GPU, instead of the virtual environment.
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

# One process per core with one thread each, because the threads of several processes would slow each other down.
pytest: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Runs the fused CUDA kernels on the CPU with Triton's interpreter. It is slow and runs one thread at a time,
# so tests with many pixels are left out, and so are tests that do not depend on the kernels. A kernel cannot raise.
KERNEL_TESTS = tests/losses/test_lovasz.py $(patsubst %,tests/losses/test_lovasz_%.py,bins hinge sigmoid softmax kernels)
INTERPRETED = not large and not accuracy and not teacher and not without_a_factor and not deterministic
INTERPRETED += and not exception and not Transforms and not forms and not extreme
KERNEL_SELECTION = $(KERNEL_TESTS) -m "not jit" -k "$(INTERPRETED)" --dtype float32
kernels: $(VENV)/installed
	TRITON_INTERPRET=1 KORNIA_LOVASZ_KERNELS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal \
		$(KERNEL_SELECTION) $(ARGS)

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests --dtype float32 \
		-k "not Large and not Group and not Process and not Compiled" -m "not jit and not grad"

# Not part of `make test`, because it takes 1.5 times as long as the tests alone.
coverage: $(VENV)/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest tests
	TRITON_INTERPRET=1 KORNIA_LOVASZ_KERNELS=1 OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(KERNEL_SELECTION)
	TRITON_INTERPRET=1 KORNIA_LOVASZ_KERNELS=1 OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest \
		tests/losses/test_lovasz_group.py -k "equals_single_process and softmax" --dtype float32
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

fuzz: $(VENV)/installed
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/losses/test_lovasz_properties.py $(ARGS)

# Changes the files of kornia/ in one place at a time, and restores them. Finished mutants are stored and not run again.
mutants: $(VENV)/installed
	$(PIP) install -c $(CONSTRAINTS) --group mutants
	test -f build/mutants.sqlite || { $(BIN)/cosmic-ray init tests/mutants.toml build/mutants.sqlite && \
		$(BIN)/cr-filter-operators build/mutants.sqlite tests/mutants.toml; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cosmic-ray exec tests/mutants.toml build/mutants.sqlite
	$(BIN)/cr-report --surviving-only --show-diff build/mutants.sqlite

doctest: $(VENV)/installed
	$(BIN)/python -m pytest --doctest-modules $(OVERLAY)
	$(BIN)/python -m pytest --doctest-glob='*.rst' docs/source --ignore=docs/source/_generated --ignore=docs/source/recipe

# Runs the benchmarks once on tiny inputs, so that they do not break unnoticed.
bench-smoke: $(VENV)/installed
	$(BIN)/python benchmarks/run.py --smoke --out build/bench-smoke
	$(BIN)/python benchmarks/threshold.py --smoke --out build/bench-smoke
	$(BIN)/python benchmarks/your_data.py --smoke

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -b html docs/source docs/build/html

# Installs torch first, so that no other package pulls in another build of it.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS) fork/compose.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) "pip>=25.1"
	$(PIP) install -c $(CONSTRAINTS) torch numpy
	$(PIP) install -c $(CONSTRAINTS) -e . --group dev --group docs --group examples
	$(PIP) install -c $(CONSTRAINTS) --no-deps --target $(VENV)/peers --upgrade --group peers
	touch $@

# Uses a separate environment, and leaves out the examples and the documentation, which need newer releases.
test-torch:
	@test -n "$(TORCH)" || { echo "give a release: make test-torch TORCH=2.5.1"; exit 2; }
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	mkdir -p build && sed "s/^torch==.*/torch==$(TORCH)/; /^triton==/d" $(CONSTRAINTS) > build/constraints-torch-$(TORCH).txt
	.venv-torch-$(TORCH)/bin/python -m pip install -q -c build/constraints-torch-$(TORCH).txt "pip>=25.1"
	.venv-torch-$(TORCH)/bin/python -m pip install -q -c build/constraints-torch-$(TORCH).txt -e . --group dev
	.venv-torch-$(TORCH)/bin/python -m pytest tests fork

# The kernels are compiled, not interpreted, because the interpreter can run them only from Triton 3.6 on.
test-triton: $(VENV)/installed
	@test -n "$(TRITON)" || { echo "give a release: make test-triton TRITON=3.1.0"; exit 2; }
	$(PIP) install --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest -n auto tests/losses/test_lovasz_kernels.py $(ARGS)

# With KORNIA=<checkout>, the patches also change Kornia's documentation.
patch patch-test: $(VENV)/installed
	$(BIN)/python -m fork.patch $(if $(KORNIA),--kornia $(KORNIA)) $(if $(filter patch-test,$@),--test)

patch-times: $(VENV)/installed
	$(BIN)/python -m fork.step_times $(ARGS)

# ARGS can have options of the script and of pytest, such as --scope tests or --dtype float32.
upstream-test: $(VENV)/installed
	@test -n "$(KORNIA)" || { echo "give a checkout of Kornia: make upstream-test KORNIA=<folder>"; exit 2; }
	$(BIN)/python -m fork.upstream_test $(KORNIA) $(ARGS)

clean:
	rm -rf $(VENV) .venv-torch-* build dist docs/build docs/source/_generated docs/source/recipe demo-output
