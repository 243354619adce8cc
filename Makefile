# What a person or CI does with this repository. `make` lists it.
#
# Cargo always runs over the whole workspace and with the development dependencies counted in (`--examples` does that for a
# build, without compiling a test): -p, or a build without them, would choose other features for shared packages, and
# compile the same 600 packages a second time.

.DEFAULT_GOAL := help
.PHONY: help build demo test test-aarch64 lint experiments experiments-report bench bench-gradient bench-train bench-verification fuzz check-transformers clean prerequisites

TORCH ?= auto
CARGO_TARGET_DIR ?= $(CURDIR)/target
export TORCH CARGO_TARGET_DIR

CARGO := scripts/with-libtorch cargo
BINARIES := $(CARGO_TARGET_DIR)/debug
TARGETS := --workspace --lib --bins --examples

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "TORCH=auto|cpu|cuda chooses libtorch for any of them (auto: CUDA where a driver for it is present)."
	@echo "libtorch is kept in MANYHANDS_CACHE, or else in ~/.cache/manyhands; an existing LIBTORCH is used as it is."

build: prerequisites ## fetch libtorch where it is missing, and build everything
	$(CARGO) build $(TARGETS)

demo: build ## train, catch a cheater, pay the honest and audit it all, on this machine
	$(BINARIES)/manyhands demo --extra-worker $(BINARIES)/cheating-worker

# The build comes first because tests start programs of other packages, which `cargo test` alone would not bring up to date.
test: build ## every test
	$(CARGO) test --workspace

test-aarch64: ## the tests of the codec and the merge on an emulated aarch64, where they must give the same bits
	scripts/test-aarch64

lint: prerequisites ## formatting, golden vectors, clippy and the documentation, warnings refused
	cargo fmt --all --check
	python3 gradient/oracle/oracle.py --check gradient/oracle/golden.json
	python3 gradient/oracle/reference.py --check gradient/oracle/reference.json
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --no-deps $(TARGETS)

EXPERIMENTS := runs/experiments
# Cargo's own sources. A build fetches what this platform needs; of all packages, the same text comes of them everywhere.
$(EXPERIMENTS)/text: | build
	cargo fetch --locked
	$(BINARIES)/manyhands prepare --dependencies 24000000 --vocabulary 2048 --held-out-per-mille 40 --shard-tokens 262144 --out $@

HOURS ?= 6
experiments: build $(EXPERIMENTS)/text ## what codec and merge do to learning: starts none after 6 hours, goes on where it stood (ONLY=ablate HOURS=12)
	$(BINARIES)/manyhands-experiments run --only "$(ONLY)" --hours $(HOURS)

experiments-report: build ## docs/experiments/RESULTS.md and its plots, from the results that are there
	$(BINARIES)/manyhands-experiments report

bench-gradient: build $(EXPERIMENTS)/text ## sizes and speeds of codec and merge, against memory and PyTorch (fetches about 6 GB once), into runs/bench/report.json
	$(BINARIES)/manyhands-experiments bench-gradient --torch-python scripts/torch-python

bench-train: build ## tokens per second of a worker, against PyTorch, into runs/bench/report.json
	$(BINARIES)/manyhands-experiments bench-train --torch-python scripts/torch-python

bench-verification: build $(EXPERIMENTS)/text ## whether checks find cheats and spare the honest, and what they cost, into runs/bench/report.json
	$(BINARIES)/manyhands-experiments bench-verification --page docs/verification

bench: bench-gradient bench-train bench-verification ## all benchmarks

FUZZ_SECONDS ?= 600
fuzz: ## made-up bytes against the decoders (`cargo install cargo-fuzz` first; FUZZ_SECONDS=3600 for longer)
	cd fuzz && for target in update moments reply evidence record accusation; do \
		CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/fuzz RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none $$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=2048 -timeout=5 || exit 1; done

check-transformers: build ## an exported model gives the same logits in Hugging Face transformers (fetches about 6 GB once)
	scripts/check-transformers

clean: ## remove what was built here (libtorch stays in its cache)
	cargo clean

prerequisites:
	@scripts/check-prerequisites
