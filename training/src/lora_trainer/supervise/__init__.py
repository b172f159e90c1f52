"""The supervisor: starts, watches and restarts the workers. Imports no torch."""
