"""Turn a base model, a dataset and one config file into a LoRA adapter."""

__version__ = "0.1.0"
