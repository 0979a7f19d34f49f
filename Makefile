# make test, make check, make versions, make demo, make docs, make bench, make soak: each makes .venv first if it is
# missing or out of date. ARGS goes through to pytest, to the example, or to soak.py;
# make bench BENCHMARKS="crossing start" runs some of them.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BENCH_STAMP := .venv/.bench-installed
MINUTES ?= 5
RANKS ?= 4
BENCHMARKS = crossing round_trips scale event_loop staging break_latency deadlines waiting start \
	at_once step_signal
SOURCES = $(wildcard src tests examples benchmarks tools)

# c10d looks up its peer's host name in the DNS; where that is slow it takes seconds.
test coverage demo bench soak: export RES_OPTIONS = timeout:1 attempts:1
demo bench soak: export OMP_NUM_THREADS = 1
# Of a resolver that knows no name for the loopback address.
bench: export TORCH_CPP_LOG_LEVEL = ERROR

.PHONY: demo test coverage check types versions docs explore bench soak

demo: $(STAMP)
	$(BIN)/python -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
		--nproc-per-node 4 examples/async_checkpoint.py $(ARGS)

# Three at a time on two processors: tests wait more than they compute.
test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder $(ARGS)

# Traced, which takes half as long again; fails below the floor in pyproject.toml.
coverage: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder \
		--cov --cov-report=term-missing:skip-covered $(ARGS)

check: $(STAMP) types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/proselint check --config .proselint.json README.md CONTRIBUTING.md CHANGELOG.md docs

# What users' type checkers see; fails below 100 %. It looks for torch where `python` on the PATH does.
types: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --verifytypes async_barriers --ignoreexternal

# The oldest and the newest torch, Python, anyio and trio, each in an environment of its own that is
# deleted before the next; ROWS="newest 2.11" runs some. PYTHONS=FOLDER:FOLDER has more Pythons.
versions: $(STAMP)
	$(BIN)/python tools/versions.py $(ROWS) $(ARGS)

# Warnings are errors. Nothing is fetched from elsewhere.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

# Every interleaving, also those that `make test` has no time for, and how many there were.
explore: $(STAMP)
	EXPLORE_DEEP=1 $(BIN)/python -m pytest tests/test_interleavings.py -s --no-cov --durations=0 $(ARGS)

# Prints its seed; SEED=N does the same things to the same ranks again.
soak: $(STAMP)
	$(BIN)/python tests/soak.py --minutes $(MINUTES) --ranks $(RANKS) \
		$(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(BENCH_STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --save; done
	$(BIN)/python benchmarks/pictures.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,demo]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@
