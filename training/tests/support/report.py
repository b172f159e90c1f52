"""What test_report.py shares with other tests."""

from lora_trainer.run import events as kinds


def step(number, **changes):
    figures = {"loss": 2.0 / number, "learning_rate": 1e-4, "grad_norm": 1.0, "step_seconds": 0.5}
    counts = {"tokens": 100, "trained_tokens": 30, "tokens_seen": 100 * number}
    values = {"time": 100.0 + number, "epoch": 0.1, "memory_bytes": 1 << 30, **figures, **counts}
    return kinds.StepDone(step=number, **(values | changes))


def evaluated(number, loss):
    return kinds.Evaluated(
        time=100.0 + number, step=number, eval_loss=loss, eval_perplexity=2.0,
        eval_token_accuracy=0.5, eval_tokens=10, eval_seconds=1.0,
    )  # fmt: skip


STARTED = kinds.RunStarted(time=100.0, run_name="lights", config_digest="abc", output_dir="/out")
FINISHED = kinds.Finished(
    time=110.0, step=3, train_seconds=75, tokens_seen=300, peak_memory_bytes=3 << 30, results=[]
)
RUN = [
    STARTED,
    evaluated(0, 3.5),
    kinds.Generated(time=100.0, step=0, when="before", exact_match=0.0, rows=64, seconds=1.0),
    *map(step, (1, 2, 3)),
    evaluated(3, 0.25),
    kinds.Generated(time=103.0, step=3, when="after", exact_match=0.9375, rows=64, seconds=1.0),
    FINISHED,
]
