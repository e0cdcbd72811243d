# SPDX-License-Identifier: GPL-2.0-or-later
#
#   make images   build the images for this host's architecture, boot one
#   make check    build all images; all checks and tests, on the images

ARCH := $(shell uname -m)
PYTHON := build/venv/bin/python
BUILDER := $(PYTHON) scripts/mkosi-build.py
TERMINAL := $(shell test -t 0 || echo '< /dev/null')

# Steps of one goal build upon each other
.NOTPARALLEL:
.PHONY: images check setup lint unit build check-functional series verify
.PHONY: table matrix bench clean

images: setup
	$(BUILDER) $(ARCH) --allow-newer
	$(BUILDER) $(ARCH) debian-min --allow-newer --boot $(TERMINAL)

check: lint build unit check-functional

setup:
	@series/setup.sh

lint: setup
	$(PYTHON) -m series lint

# Files with slow tests wait, or have a program that runs, half of the time
unit: setup
	$(PYTHON) -m pytest --numprocesses=2 --dist=loadfile tests/mkosi

# A locked package may have left all mirrors by now
build: setup
	$(BUILDER) all --allow-newer

check-functional: setup
	@$(PYTHON) -m series check

# Commits on the git checkout QEMU_SRC, or on a copy of the plain tree
series: setup
	@$(PYTHON) -m series patches

# Slow; TREES="<path> ..." are QEMU trees to check the series on
verify: setup
	$(PYTHON) -m series verify --thorough $(TREES)

# QEMU's own tests on our images: what they fetch, before and after
table: setup
	$(PYTHON) -m series table

# The same images on the QEMU of several distributions; ROWS="<row> ..."
matrix: build
	@$(PYTHON) -m series matrix --allow-newer $(ROWS)

bench: setup
	$(PYTHON) tests/mkosi/bench.py --json build/bench.json \
		--tree "$$($(PYTHON) -m series apply)"

clean:
	rm -rf build
