# Every target works as the first command in a fresh clone: it makes .venv, fetches what it needs and runs.
PYTHON ?= python3
RUN = .venv/bin/python
RUN_GPU = .venv-gpu/bin/python
SHAKESPEARE = data/tinyshakespeare/tiny_shakespeare_
PYDOC = data/pydoc/pydoc_

.PHONY: train train-gpu test test-gpu test-full data text lint bench bench-gpu clean distclean help

train: .venv/ready  ## GPT-2 124M on Tiny Shakespeare; without its weights, a small model of bytes; ARGS=-x 100: more flags
	@$(RUN) dev/start.py $(ARGS)

data: .venv/ready  ## weights, text and vocabulary into data/, or the best that can be had without a network
	@[ -f data/gpt2_124M.bin ] || $(RUN) dev/download_starter_pack.py || \
	  echo "no GPT-2 weights: a small model will be trained from scratch"
	@$(MAKE) -s text

text: .venv/ready  ## only the text
	@[ -f $(SHAKESPEARE)train.bin ] || $(RUN) dev/data/tinyshakespeare.py || { \
	  echo "no Tiny Shakespeare: training on the Python language reference, which every Python carries"; \
	  [ -f $(PYDOC)train.bin ] || $(RUN) dev/data/pydoc.py; }

help:  ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
	  printf "make %-11s %s\n" "$$name" "$$text"; done
	@echo "Another Python for all of them: make PYTHON=python3.12 train"

test: .venv/test  ## the gradients beside PyTorch's numbers and the unit tests; under five minutes with the installation
	@failed=0; $(RUN) test_gpt2.py || failed=1; $(RUN) -m pytest -rfEs || failed=1; exit $$failed

test-full: .venv/dev test text  ## and GPT-2 124M's size: PyTorch writes a checkpoint and a debug state, we check ours
	$(RUN) dev/train_gpt2_torch.py -e d12 --write_dir data -i $$(ls $(SHAKESPEARE)train.bin $(PYDOC)train.bin 2>/dev/null | tail -1)
	$(RUN) test_gpt2.py data/gpt2_d12.bin data/gpt2_d12_debug_state.bin

lint: .venv/test  ## ruff, on tracked files
	$(RUN) -m ruff check $$(git ls-files "*.py")

clean:  ## removes the environment and compiled kernels; data/ stays
	rm -rf .venv .venv-gpu .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## and what is in data/: texts, weights, what test-full wrote (1 GB), runs; asks first
	@git clean -ndX data; printf "remove all of this? [y/N] "; read -r answer; \
	if [ "$$answer" = y ]; then git clean -qfdX data; else echo "data/ stays"; fi

comma := ,
bench: .venv/ready  ## this machine's ceilings, every kernel, whole steps; ARGS=--torch puts PyTorch beside them
	$(RUN) -m dev.bench $(ARGS)
	$(RUN) -m dev.bench --precision bf16 --only kernels,steps$(if $(findstring --torch,$(ARGS)),$(comma)torch --torch)

train-gpu: data .venv-gpu/ready  ## GPT-2 124M on an NVIDIA GPU, on the data of `make train`; driver 580 or newer
	@if [ -f $(SHAKESPEARE)train.bin ]; then D=$(SHAKESPEARE); else D=$(PYDOC); fi; \
	if [ -f data/gpt2_124M.bin ]; then M=data/gpt2_124M.bin; else M=d12; fi; \
	$(RUN_GPU) train_gpt2.py --device cuda -e $$M -i $${D}train.bin -j $${D}val.bin -b 4 -t 1024 -x 100 -l 3e-4 -u 10

test-gpu: .venv-gpu/test  ## the tiny model's gradients in both precisions, and the GPU engine's tests
	$(RUN_GPU) test_gpt2.py --device cuda --precision fp32
	$(RUN_GPU) test_gpt2.py --device cuda --precision bf16
	$(RUN_GPU) -m pytest dev/test/test_cuda.py dev/test/test_cuda_host.py dev/test/test_contract.py

bench-gpu: .venv-gpu/ready  ## whole steps and kernels; ARGS=--torch puts compiled PyTorch beside them
	$(RUN_GPU) -m dev.bench_gpu --kernels $(ARGS)

.venv-gpu/ready: dev/engine/requirements.txt
	$(PYTHON) -m venv .venv-gpu
	$(RUN_GPU) -m pip install -q -r dev/engine/requirements.txt
	@touch $@

.venv-gpu/test: .venv-gpu/ready
	$(RUN_GPU) -m pip install -q pytest "cuda-toolkit[nvcc]==13.*"
	@touch $@

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, this is %d.%d\n---> HINT: make PYTHON=python3.12 names another one" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	@touch $@

.venv/test: .venv/ready
	$(RUN) -m pip install -q pytest ruff
	@touch $@

.venv/dev: .venv/test dev/requirements.txt dev/run/requirements-mpi.txt
	$(RUN) -m pip install -q -r dev/requirements.txt -r dev/run/requirements-mpi.txt
	@touch $@
