"""The checks that `bench/gpu.py` runs; each module holds one or two of its sections."""
