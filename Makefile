# make          build ./painters (OpenMP is used where the compiler has it)
# make test     build and run the tests: a C compiler and Python 3's standard library are enough
# make demo     the paper in two minutes, on the small models of tests/small
# make paper    all of it, about an hour on two cores; stop and go on as you like
# make bench    speed beside llama.cpp, transformers, lm-evaluation-harness, tokenizers, llama2.c:
#               PEERS=a python that has them (default: what make peers installs in .venv),
#               LLAMA2C=a checkout, BENCH="--quick --rows stories 'prefill-*'"
# make debug    ./painters-debug with address and undefined-behaviour sanitizers
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

painters-valgrind: painters.c Makefile
	$(CC) -std=gnu11 -O1 -g $(WARN) painters.c -o $@ -lm

debug: painters-debug

test: painters
	CC='$(CC)' $(PYTHON) tests

# Peers of the benchmark from PyPI, in .venv; and llama.cpp once more, as on a CPU without AVX-512.
# gcc 12 removes the stores that its AMX code loads: it ends at the first 8-bit weights without DSE.
CPU_TORCH = --extra-index-url https://download.pytorch.org/whl/cpu
DSE = -fno-tree-dse -fno-dse
AVX2 = -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON

peers:
	$(PYTHON) -m venv .venv
	CFLAGS='$(DSE)' CXXFLAGS='$(DSE)' .venv/bin/pip install $(CPU_TORCH) $$($(PYTHON) tests/bench.py --peers)
	$(PYTHON) -m venv .venv/avx2
	CMAKE_ARGS='$(AVX2)' .venv/avx2/bin/pip install --no-cache-dir --no-binary llama-cpp-python \
		$$($(PYTHON) tests/bench.py --peers | tr ' ' '\n' | grep llama)

PEERS ?= $(firstword $(wildcard .venv/bin/python) $(PYTHON))
PEERS_AVX2 ?= $(wildcard .venv/avx2/bin/python)
LLAMA2C ?=
BENCH ?=

bench:
	CC='$(CC)' $(PYTHON) tests/bench.py --python $(PEERS) $(addprefix --python-avx2 ,$(PEERS_AVX2)) \
		$(addprefix --llama2c ,$(LLAMA2C)) $(BENCH)

# The small models and their tasks (tests/train.py made them).
SMALL = tests/small
LLAMA = ./painters $(SMALL)/llama.bin
BERT = ./painters $(SMALL)/bert.bin
LLAMA_TASKS = $(foreach t,science ending pronoun lastword sums,$(SMALL)/$(t).tsv)
BERT_TASKS = accept sentiment paraphrase entail answers similar
FINE_TUNED = accept accept-skip4 sentiment sentiment-skip4
METHODS = skip,repeat,reverse,random:$(1),parallel,loop:$(2)
SUM = "Question: Jane buys 4 plums for 4 coins each and 2 dates for 3 coins each. \
How many coins does Jane pay? Answer:"

demo: painters
	@mkdir -p demo
	@for flags in "" "--drop 5" "--repeat 2" "--parallel 1" "--loop 1 --times 7"; do \
		echo "--- painters llama.bin --prompt ... $$flags"; \
		$(LLAMA) --tokens 24 --quiet $$flags --prompt $(SUM); \
	done
	$(LLAMA) --eval $(SMALL)/science.tsv $(SMALL)/pronoun.tsv $(SMALL)/sums.tsv --limit 25 \
		--sweep $(call METHODS,2,3) --svg demo/llama
	$(LLAMA) --cosine $(SMALL)/lastword.tsv --limit 25 --svg demo/cosine.svg
	$(BERT) --prompt "the [MASK] is in the garden ." --quiet
	./painters $(SMALL)/bert-sentiment.bin --eval $(SMALL)/sentiment.tsv --limit 100 \
		--sweep $(call METHODS,2,3) --svg demo/bert

# Every step goes on from where it was stopped.
paper: painters
	mkdir -p paper
	$(LLAMA) --eval $(LLAMA_TASKS) --out paper/llama.out --sweep $(call METHODS,10,1-8),drop,swap \
		--svg paper/llama >paper/llama.txt
	$(LLAMA) --cosine $(SMALL)/lastword.tsv --limit 100 --svg paper/cosine-llama.svg \
		>paper/cosine-llama.tsv
	for task in $(BERT_TASKS); do $(BERT) --eval $(SMALL)/$$task.tsv --out paper/bert.out \
		--probe $(SMALL)/$${task}_train.tsv --sweep $(call METHODS,10,1-3),drop,swap >/dev/null || exit 1; \
	done
	./painters --report paper/bert.out --svg paper/bert >paper/bert.txt
	for model in $(FINE_TUNED); do ./painters $(SMALL)/bert-$$model.bin --out paper/$$model.out \
		--eval $(SMALL)/$${model%-skip4}.tsv --sweep $(call METHODS,10,1-3),drop,swap \
		--svg paper/$$model >paper/$$model.txt || exit 1; \
	done
	$(BERT) --cosine $(SMALL)/sentiment.tsv --limit 100 --svg paper/cosine-bert.svg \
		>paper/cosine-bert.tsv

clean:
	rm -rf painters painters-debug painters-valgrind demo paper

.PHONY: debug test peers bench demo paper clean
