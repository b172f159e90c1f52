"""The operating system's side: disk, temporary folders, signals, output streams."""
