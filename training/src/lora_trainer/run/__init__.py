"""The record of a run: events, status, folder and lock. Imports no torch."""
