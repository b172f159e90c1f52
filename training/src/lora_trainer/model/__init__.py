"""Base model, adapter, attention and head."""
