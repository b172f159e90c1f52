"""A run on record: its events, status, folder and lock. Imports no torch."""
