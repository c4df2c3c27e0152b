# make demo: set up what training needs, train on real reviews, generate.   make test: set up everything, run all quick tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-demo

.PHONY: demo test test-slow check docs notebook screenshots bench clean
.SILENT: $(READY) $(DEMO_READY)

# Bytecode is kept, wherever the environment says otherwise: it is compiled when it is first needed, not by pip.
export PYTHONDONTWRITEBYTECODE =

demo: $(DEMO_READY)
	$(BIN)/python cli.py demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder  # one more than two cores: some wait

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m tests.command_reference > docs/commands.md
	$(BIN)/python -m tests.method_table
	$(BIN)/python -m tests.family_table
	$(BIN)/python -m sphinx -W --keep-going -q -E -a -c docs . build/docs
	@echo 'The site: build/docs/index.html'

notebook: $(READY)  # trains four adapters, which takes some minutes
	$(BIN)/python -m tests.notebook

screenshots: $(READY)  # trains two adapters, which takes some minutes
	LORA_TUNER_SCREENSHOTS=$(CURDIR)/docs/page $(BIN)/python -m pytest -n 0 -m slow tests/server/playground/test_screenshots.py

bench: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

$(DEMO_READY): EXTRAS := embedded
$(READY): EXTRAS := embedded,serve,quantized,documents,report,gguf,docs,dev
$(DEMO_READY) $(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): a few minutes the first time.'
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(DEMO_READY) $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
