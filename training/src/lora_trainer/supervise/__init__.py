"""The supervisor: starts, watches and restarts the workers. Imports no torch.

`supervisor.py` runs them, `watchdog.py` detects stalls and shortages, `endings.py` says how a
worker ended, and `recovery.py` and `restarts.py` decide whether it is restarted.
"""
