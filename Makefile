# make demo   the main job on the sample model: export, rewrite, check, report (CPU, under ten minutes)
# make test   lint, types and all tests; those that need a GPU, nvcc or TensorRT's headers run where these are found
# make kernels   the CUDA libraries, in build/kernels (nvcc, CUDA 13; HEAD_DIMS="64;96;128;256")
# All make their own virtual environment in .venv first. PYTHON names the interpreter (3.11 or newer).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
HEAD_DIMS ?= 64;96;128;256

.PHONY: demo test lint kernels clean

demo: $(VENV)/.ready
	$(BIN)/sa-export convert --model samples/needle/model --dtype fp32 --output out/demo --force \
	    --lengths 4096 --prompts 10 --needles 20 --compare-papers

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'plugins/*.h' 'plugins/*.cuh' 'plugins/*.cu' 'plugins/*.cpp' 'tests/*.h' 'tests/*.cpp' | xargs -r $(BIN)/clang-format --dry-run --Werror

kernels: $(VENV)/.ready
	cmake -S . -B build/kernels -DSA_CUDA=ON -DSA_HEAD_DIMS="$(HEAD_DIMS)" -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build build/kernels -j2
	$(BIN)/python plugins/dev/resources.py build/kernels

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "sa-export needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	SA_SKIP_CMAKE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,test-tensorrt]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0
	touch $@

clean:
	rm -rf $(VENV) out build .pytest_cache .mypy_cache .ruff_cache
