"""The worker: where data, model and training loop come together."""
