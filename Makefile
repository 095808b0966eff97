# Two commands matter: `make run` and `make test`. Each works alone, twice, and without a network the second time.
VENV    := .venv
PYTHON  := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
MODEL   ?= demo
PROMPT  ?= replica
ARGS    ?=

.PHONY: run test test-fast lint types demo-model clean

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard kernels/native/*.cpp kernels/native/*.h kernels/native/*.inl)
	test -x $(PYTHON) || python3.11 -m venv $(VENV) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel pybind11
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/.installed-dev: $(STAMP)
	CHIPBUS_BUILD_NATIVE=0 $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

run: $(STAMP)  ## generate text from the demo model through every actor: make run PROMPT="…" MODEL=… ARGS="…"
	$(VENV)/bin/bus-run generate $(MODEL) -p "$(PROMPT)" $(ARGS)

test: $(VENV)/.installed-dev  ## the whole suite
	$(VENV)/bin/pytest

test-fast: $(VENV)/.installed-dev  ## everything that takes less than a second each
	$(VENV)/bin/pytest -m "not slow"

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy sees the rooms as the one package they ship as
	rm -rf build/typed && CHIPBUS_BUILD_NATIVE=0 $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target build/typed .
	cd build/typed && MYPYPATH=. ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p chipbus

demo-model: $(VENV)/.installed-dev  ## train chipbus/demo/ again on docs/glossary.md and docs/semantics.md (minutes)
	$(PYTHON) -m chipbus.tools.make_demo_model --seed 0 --threads 2

clean:
	rm -rf kernels/_native*.so $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
