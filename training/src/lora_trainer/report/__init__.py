"""Human-readable output: console text, charts, the report, the model card. Imports no torch."""
