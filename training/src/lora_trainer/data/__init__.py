"""Data: read -> format -> template and mask -> cache -> batches."""
