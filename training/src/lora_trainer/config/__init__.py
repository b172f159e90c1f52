"""The configuration: what it may say, and where each value comes from."""
