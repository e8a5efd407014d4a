# Sluice. `make` alone lists the tasks.
.DEFAULT_GOAL := help
.PHONY: help install tools demo up test check format bench proof gen gen-check baseline lock example clean

PY := .venv/bin/python
STAMP := .venv/.installed

help: ## Lists the tasks
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

$(STAMP): requirements-dev.lock pyproject.toml tools/install.py
	python3 tools/install.py

install: $(STAMP) ## Makes .venv with locked, hashed dependencies and the `sluice` command

tools: install ## Installs grpcurl, the npm project and the PostgreSQL that the tests need
	$(PY) -m tools.externals

demo: install ## Runs the main job on the embedded defaults with a real model
	.venv/bin/sluice demo

up: install ## Starts Sluice (all in one process) and prints addresses and a key
	.venv/bin/sluice up

test: install tools ## Runs every test
	$(PY) -m pytest

check: install ## Format, lint, types, imports, protos, generated code
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/buf lint
	.venv/bin/buf format -d --exit-code protos
	.venv/bin/buf breaking protos --against protos/baseline.binpb
	$(PY) -m tools.generate --check
	$(PY) -m tools.example --check

format: install ## Formats Python and protos
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	.venv/bin/buf format -w protos

bench: install ## Measures CPU per request against a bare proxy (FULL rounds; takes minutes)
	$(PY) -m tests.bench

proof: install ## Runs the measured scenarios; ONLY=mesh runs those of one name, SHORT=1 the short form
	$(PY) -m tests.proof $(if $(ONLY),--only $(ONLY)) $(if $(SHORT),--short)

gen: install ## Regenerates gen/ from protos/
	$(PY) -m tools.generate

gen-check: install ## Compares gen/ with what the protos give
	$(PY) -m tools.generate --check

baseline: install ## Writes the image that `buf breaking` compares with: at a release only
	$(PY) -m tools.generate
	.venv/bin/buf build protos -o protos/baseline.binpb

example: install ## Rewrites deploy/sluice.example.yaml from the settings
	$(PY) -m tools.example

lock: install ## Writes the locks anew
	$(PY) -m tools.lock

clean: ## Removes what was installed and built here
	rm -rf .venv .cache
