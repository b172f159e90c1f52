"""What test_config.py shares with other tests."""

from pathlib import Path

TRAINING = Path(__file__).parents[2]
