"""The commands around a run: check, chat, evaluate, export, merge."""
