# rethaw's front door. Every target does all the set-up it needs, from a fresh clone, as root on
# Debian 12:
#
#   make demo    start the service, take a sandbox, run a command, pause and resume it, stop
#   make test    every test, on real VMs
#   make bench   the benchmarks; results in target/bench/*.json
#   make build   binaries only
#   make package the Debian package, in target/debian
#   make lint    rustfmt and clippy, as the tests demand them
#   make clean   build products (not $RETHAW_HOME)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

TRIPLE := x86_64-unknown-linux-gnu
TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
AGENT := $(TARGET)/agent/$(TRIPLE)/agent/rethaw-agent

.PHONY: build setup agent demo test bench package lint clean

setup:
	@scripts/setup

build: setup agent
	cargo build --release --locked --workspace
	install -m 0755 $(AGENT) $(TARGET)/release/rethaw-agent-static

# Static, because the guest has its own libraries; small, because its pages are in every clone's
# working set. A target directory of its own, because its flags would rebuild everything else.
agent: setup
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --locked --profile agent \
	    -p rethaw-agent --bin rethaw-agent --target $(TRIPLE) --target-dir $(TARGET)/agent

demo: build
	@scripts/demo

test: build
	@scripts/test

bench: build
	@scripts/bench

package: build
	@scripts/package

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

clean:
	cargo clean
