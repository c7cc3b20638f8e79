# make          build ./painters (OpenMP is used where the compiler has it)
# make test     build and run the tests: a C compiler and Python 3's standard library are enough
# make demo     the paper in two minutes, on the small models of tests/models
# make paper    all of it, about an hour on two cores; stop and go on as you like
# make debug    ./painters-debug with address and undefined-behaviour sanitizers
# make bench    against llama.cpp, transformers and others (installs them into a virtual environment)
# CC, CFLAGS and OPENMP are respected: make CC=clang CFLAGS=-O2 OPENMP=

CC ?= cc
CFLAGS ?= -O3
WARN = -Wall -Wextra -Wpedantic -Wshadow
PYTHON ?= python3

# The first set of flags with which a program that calls OpenMP compiles and links: gcc and clang on
# Linux, Homebrew's libomp on Apple silicon, and on Intel.
PROBE = printf '\#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n' | \
	$(CC) $(CFLAGS) -x c - -o /dev/null $(1) 2>/dev/null && echo '$(1)'
BREW = -Xpreprocessor -fopenmp -I$(1)/opt/libomp/include -L$(1)/opt/libomp/lib -lomp
OPENMP ?= $(firstword $(subst $(SPACE),~,$(strip $(shell $(call PROBE,-fopenmp) || \
	{ $(call PROBE,$(call BREW,/opt/homebrew)); } || { $(call PROBE,$(call BREW,/usr/local)); }))))
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
OMPFLAGS := $(subst ~,$(SPACE),$(OPENMP))

painters: painters.c Makefile
	@echo "OpenMP: $(if $(OMPFLAGS),$(OMPFLAGS),not found; one thread)"
	$(CC) -std=gnu11 $(CFLAGS) $(WARN) painters.c -o $@ $(OMPFLAGS) -lm

painters-debug: painters.c Makefile
	$(CC) -std=gnu11 -O1 -g -fsanitize=address,undefined -fno-omit-frame-pointer $(WARN) painters.c \
		-o $@ $(OMPFLAGS) -lm

debug: painters-debug

test: painters
	CC='$(CC)' $(PYTHON) -m unittest discover -s tests -p 'test_*.py'

clean:
	rm -rf painters painters-debug demo paper

.PHONY: debug test clean
