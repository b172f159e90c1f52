"""What test_config.py shares with other tests."""

from pathlib import Path

TRAINING = Path(__file__).parents[2]
# As they are in the specification.
SPECIFIED = (
    {
        "per_device_train_batch_size": 4, "use_4bit": True, "max_seq_length": 1024,
        "gradient_accumulation_steps": 2,
    },
    {
        "per_device_train_batch_size": 16, "use_flash_attention": True, "num_train_epochs": 1,
        "logging_steps": 50,
    },
)  # fmt: skip
