"""The comparison of trainers on the same model, rows and first adapter (`bench/peers.py`)."""
