# Everything starts here: `make run` and `make test` set up whatever is missing and need nothing else.
PYTHON ?= python3
BIN := .venv/bin
SETUP = $(PYTHON) -m provisioner.toolchain setup

.PHONY: run setup setup-tests test lint bench lock clean

run: setup  ## Set up what is missing, then serve http://localhost:8000
	@exec $(BIN)/machineuse serve

setup:  ## Set up what is missing
	@$(SETUP)

setup-tests:
	@$(SETUP) --tests

test: setup-tests lint  ## Set up what is missing, then check the code and run every test
	$(BIN)/pytest

lint: $(BIN)/ruff  ## Style, types and the rules about layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/ruff:
	@$(SETUP) --tests

bench: setup  ## Measure a create against a bare `docker run`
	$(BIN)/python -m bench

# Kept free of index addresses: the lock is good with any mirror, its hashes say what is meant.
lock:  ## Lock the newest versions that pyproject.toml allows
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet pip-tools
	build/lock/bin/pip-compile --quiet --upgrade --extra dev --build-deps-for editable --allow-unsafe --strip-extras \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header \
		--output-file requirements.lock pyproject.toml
	rm -rf build/lock

clean:  ## Remove what can be made again; the data directory and the user's cache stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.machineuse/*' -prune -exec rm -rf {} +
