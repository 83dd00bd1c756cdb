# Thin: README shows the pip lines under each. PYTHON=python3.12 make demo picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow install peers
demo: install
	$(BIN)/qft run recipes/quickstart.yaml

test: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

install: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# llama.cpp's own look at the processor ends in a crash where there is AMX, so it is told what it may use.
LLAMA := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
ifneq ($(shell grep -m1 -o avx512_vnni /proc/cpuinfo 2>/dev/null),)
LLAMA += -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON
endif

peers: .venv-peers/installed
.venv-peers/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	CMAKE_ARGS="$(LLAMA)" .venv-peers/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	touch $@
