"""The HTTP server and its responses. Imports no torch."""
