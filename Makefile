# Two commands matter: `make run` and `make test`. Each works alone, twice, and without a network the second time.
VENV    := .venv
PYTHON  := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
MODEL   ?= demo
PROMPT  ?= replica
ARGS    ?=
SEED    ?= 0
FAULTS  ?= 500
CHIP    ?= null
JOBS    ?= 2
PIP     := $(PYTHON) -m pip --quiet --disable-pip-version-check
INSTALL := install --no-build-isolation
SITE    := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: run serve test test-fast test-torch chaos sanitize lint types demo-model clean

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard kernels/native/*.cpp kernels/native/*.h kernels/native/*.inl)
	test -x $(PYTHON) || python3.11 -m venv $(VENV) || python3 -m venv $(VENV)
	rm -f kernels/_native*.so  # a build that fails leaves none rather than the last one
	$(PIP) $(INSTALL) -c constraints.txt setuptools pybind11
	$(PIP) $(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(STAMP)  # the native engine is there already
	CHIPBUS_BUILD_NATIVE=0 $(PIP) $(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-serve: $(STAMP)
	CHIPBUS_BUILD_NATIVE=0 $(PIP) $(INSTALL) -c constraints.txt -e '.[serve]'
	touch $@

run: $(STAMP)  ## generate text from the demo model through every actor: make run PROMPT="…" MODEL=… ARGS="…"
	$(VENV)/bin/bus-run generate $(MODEL) -p "$(PROMPT)" $(ARGS)

serve: $(VENV)/.installed-serve  ## OpenAI's API on http://127.0.0.1:8000/v1: make serve MODEL=… ARGS="-dp 2"
	$(VENV)/bin/bus-run serve $(MODEL) $(ARGS)

test: $(VENV)/.installed-dev  ## the whole suite
	$(VENV)/bin/pytest -n $(JOBS) --dist worksteal

test-fast: $(VENV)/.installed-dev  ## everything that takes less than a second each
	$(VENV)/bin/pytest -m "not slow"

test-torch: $(VENV)/.installed-dev  ## kernels and whole engines once more, on an install made where nothing compiles
	rm -rf build/lib* build/torch
	$(PYTHON) -m venv --without-pip build/torch
	$(PYTHON) $(SITE) > "$$(build/torch/bin/python $(SITE))/dependencies.pth"
	CC=false CXX=false $(PIP) --python build/torch/bin/python $(INSTALL) --no-deps --ignore-installed .
	build/torch/bin/python -P -c 'from chipbus.kernels import native; assert native.library is None'
	cd build/torch && bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. ../../tests/kernels $(addprefix ../../tests/e2e/test_,engine.py parity.py record.py weights.py) \
		--timeout 200 -k 'not (widths_of_qwen3 and bfloat16)'  # two of a minute each where torch has no AMX

chaos: $(VENV)/.installed-dev  ## kill, stop and stall every kind of process under load: make chaos SEED=7 FAULTS=5000 CHIP=cpu
	PYTHONPATH=tests:tests/chaos $(PYTHON) -P tests/chaos/chaos.py --seed $(SEED) --faults $(FAULTS) --chip $(CHIP)

sanitize:  ## the native engine's tests in C++ under address, undefined and thread sanitizers: needs a C++20 compiler alone
	@$(MAKE) --no-print-directory --output-sync -j$$(nproc) -f tests/native/Makefile

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy sees the rooms as the one package they ship as
	rm -rf build/lib* build/typed && CHIPBUS_BUILD_NATIVE=0 $(PIP) $(INSTALL) --no-deps --target build/typed .
	cd build/typed && MYPYPATH=. ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p chipbus

demo-model: $(VENV)/.installed-dev  ## train chipbus/demo/ again on docs/glossary.md and docs/semantics.md (minutes)
	$(PYTHON) -m chipbus.tools.make_demo_model --seed 0 --threads 2

clean:
	rm -rf kernels/_native*.so $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
