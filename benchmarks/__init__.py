"""How fast generated programs are: beside hand-written ones, and beside the libraries that do the same at run time.

    python -m benchmarks steps              step times, ratios, collectives and bytes, on two gloo ranks
    python -m benchmarks compile            compile time by stage, and peak memory, over the number of layers

``docs/performance.md`` shows what they gave. Nothing is timed in the tests.
"""
