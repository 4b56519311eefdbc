# make demo   the main job on the sample model: export, rewrite, check, report (CPU, under ten minutes)
# make test   lint, types and all tests that need no GPU
# Both make their own virtual environment in .venv first. PYTHON names the interpreter (3.11 or newer).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.ready
	$(BIN)/sa-export convert --model samples/needle/model --dtype fp32 --output out/demo --force \
	    --lengths 4096 --prompts 10 --needles 20 --compare-papers

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'plugins/*.h' 'plugins/*.cuh' 'plugins/*.cu' 'plugins/*.cpp' 'tests/*.cpp' | xargs -r $(BIN)/clang-format --dry-run --Werror

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "sa-export needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	SA_SKIP_CMAKE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) out build .pytest_cache .mypy_cache .ruff_cache
