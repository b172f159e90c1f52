"""Operating system services: disk, temporary folders, signals, output streams."""
