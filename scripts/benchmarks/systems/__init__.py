"""One module per measured system. Each runs in a process of its own as ``python -m benchmarks.systems.NAME JOB``, see
:mod:`benchmarks.runner`."""
