"""Folders on an object store, through fsspec: a run's output and datasets. Imports no torch."""
