# Every target works as the first command in a fresh clone: it makes .venv, fetches what it needs and runs.
PYTHON ?= python3
RUN = .venv/bin/python
SHAKESPEARE = data/tinyshakespeare/tiny_shakespeare_
PYDOC = data/pydoc/pydoc_
# from scratch: a small model, about four minutes on two cores
SCRATCH = -e d6 -b 8 -t 64 -x 300 -l 1e-3 -u 20 -q 0.1 -v 50 -s 100 --top_k 40

.PHONY: train test test-full data text lint bench clean

train: data  ## GPT-2 124M on Tiny Shakespeare; without its weights or that text, a small model from scratch
	@if [ -f data/gpt2_124M.bin ] && [ -f $(SHAKESPEARE)train.bin ]; then $(RUN) train_gpt2.py; \
	elif [ -f $(SHAKESPEARE)train.bin ]; then $(RUN) train_gpt2.py $(SCRATCH); \
	else $(RUN) train_gpt2.py -i $(PYDOC)train.bin -j $(PYDOC)val.bin $(SCRATCH); fi

data: .venv/ready  ## weights, text and vocabulary into data/, or the best that can be had without a network
	@[ -f data/gpt2_124M.bin ] || $(RUN) dev/download_starter_pack.py || \
	  echo "no GPT-2 weights: a small model will be trained from scratch"
	@$(MAKE) -s text

text: .venv/ready
	@[ -f $(SHAKESPEARE)train.bin ] || $(RUN) dev/data/tinyshakespeare.py || { \
	  echo "no Tiny Shakespeare: training on the Python language reference, which every Python carries"; \
	  [ -f $(PYDOC)train.bin ] || $(RUN) dev/data/pydoc.py; }

test: .venv/test  ## under five minutes with the installation
	$(RUN) test_gpt2.py
	$(RUN) -m pytest

test-full: .venv/dev test text  ## and GPT-2 124M's size: PyTorch writes a checkpoint and a debug state, we check ours
	$(RUN) dev/train_gpt2_torch.py -e d12 --write_dir data -i $$(ls $(SHAKESPEARE)train.bin $(PYDOC)train.bin 2>/dev/null | tail -1)
	$(RUN) test_gpt2.py data/gpt2_d12.bin data/gpt2_d12_debug_state.bin

lint: .venv/test
	$(RUN) -m ruff check $$(git ls-files "*.py")

clean:  ## the environment and compiled kernels; data/ stays
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

bench: .venv/ready  ## this machine's ceilings, every kernel, whole steps; ARGS=--torch puts PyTorch beside them
	$(RUN) -m dev.bench $(ARGS)

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	@touch $@

.venv/test: .venv/ready
	$(RUN) -m pip install -q pytest ruff
	@touch $@

.venv/dev: .venv/test dev/requirements.txt dev/run/requirements-mpi.txt
	$(RUN) -m pip install -q -r dev/requirements.txt -r dev/run/requirements-mpi.txt
	@touch $@
