"""Time and memory of the engine, as ratios taken side by side: ``python -m benchmarks --help``."""
