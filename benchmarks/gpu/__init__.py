"""What needs a card: `bash benchmarks/gpu/run.sh`."""
