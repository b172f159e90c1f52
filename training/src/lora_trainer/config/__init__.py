"""The configuration: one frozen `Config` from the config file, environment and command line.

`settings.py` reads the sources (`file.py`, `environment.py`, `arguments.py`), merges them by
`precedence.py` and validates them against `schema.py`. Imports no torch.
"""
