"""The record of a run: events, status, health (stall limits in `health.py`, silence in
`silence.py`), folder and lock. Imports no torch."""
