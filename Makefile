# make demo: environment, install, the pipeline on the embedded model. make test: ruff, mypy, pytest.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test install clean

demo: install
	$(BIN)/gpt2-compress demo --force finetune.lora_rank=16 finetune.lora_alpha=16 \
		'benchmark.metrics=[{metric: perplexity, max_tokens: 32768}, latency, size]'

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -rs

install: $(VENV)/installed

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
