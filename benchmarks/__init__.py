"""How fast generated programs are: beside hand-written ones, and beside the libraries that do the same at run time.

    python -m benchmarks steps              step times, ratios, collectives and bytes, on two gloo ranks
    python -m benchmarks steps --compiled   the same under torch.compile
    python -m benchmarks dispatch           what a step costs beside its communication: kernels and Python of one rank
    python -m benchmarks table FILE ...     what steps wrote with --out, as the table of docs/performance.md
    python -m benchmarks.compile_time       compile time by stage, and peak memory, of 2 to 80 layers
    python -m benchmarks.scaling            what 1, 2, 4 and 8 ranks compute and communicate, counted
    python -m benchmarks.overlap FILE       a timeline of a backward pass and its gradient buckets

``docs/performance.md`` shows what they gave. Nothing is timed in the tests.
"""
