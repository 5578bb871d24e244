"""What the library promises, measured: `python -m benchmarks --help`. Run from a checkout; nothing here is installed."""
