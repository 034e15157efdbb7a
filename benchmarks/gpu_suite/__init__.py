"""All GPU tests and benchmarks in one command: ``python -m benchmarks.gpu_suite --json FILE``, under ten minutes."""
