"""Compare this project with other LoRA trainers on the same model, rows and first adapter.

    python bench/peers.py                       # about 15 minutes on 2 otherwise idle cores
    python bench/peers.py --rows 8 --repeats 1  # does everything work?
    python bench/peers.py --quick               # 15 seconds, against Trainer + PEFT only, as in CI

Contestants: `lora-trainer train`, transformers' Trainer with PEFT, TRL's SFTTrainer padded and
packed; the peers from PyPI, in an environment of their own under ~/.cache/lora-trainer/bench.
Each one trains the embedded SmolLM2-135M in float32 on rows of the Jargon File (Debian's package,
downloaded) and of the demo set, in a fresh process, in turn. At every step loss and gradient norm
must be those of the plain reference (comparison/plain.py), or the comparison fails.

Writes results.json and comparison.png into --out, and prints a table. `docs/decisions/0031` has
the last results. Run it with the project's own Python: training/.venv/bin/python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from comparison import data, ours, results
from comparison.contest import OURS, Contest, run, seconds_to_import
from comparison.environments import cache_folder, peers_python
from comparison.job import KINDS, Job


def make_job(name: str, rows: list[dict[str, object]], cache: Path, rank: int = 16) -> Job:
    """Return a job for the embedded model, with its tokens and its first adapter."""
    from lora_trainer.config.schema import ModelSection
    from lora_trainer.model.load import locate

    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]
    folder = cache / f"{name}-{len(rows)}-{digest}"
    job = Job(name, str(folder), str(locate(ModelSection()).path), rank)
    folder.mkdir(parents=True, exist_ok=True)
    job.write()
    if not job.tokens.exists():
        ours.prepare(job, rows)
    return job


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16, help="rows of the Jargon File (16)")
    parser.add_argument("--demo-rows", type=int, default=32, help="rows of the demo set (32)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contestant (3)")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    everyone = ",".join((OURS, *KINDS))
    parser.add_argument("--contestants", default=everyone, help=f"on the Jargon File ({everyone})")
    parser.add_argument("--demo-contestants", default=everyone, help="on the demo set (the same)")
    parser.add_argument("--quick", action="store_true", help="tiny model, Trainer + PEFT only")
    parser.add_argument("--record", action="store_true", help="with --quick: keep its ratio")
    options = parser.parse_args()
    if options.quick:
        from comparison import quick

        sys.exit(quick.main(is_recording=options.record))
    cache = cache_folder()
    peers = peers_python(cache)
    out = options.out or cache / "results"
    out.mkdir(parents=True, exist_ok=True)
    jobs = [make_job("jargon", data.jargon_rows(cache)[: options.rows], cache),
            make_job("demo", data.demo_rows()[: options.demo_rows], cache)]  # fmt: skip
    figures: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="lora-bench-") as folder:
        for job, names in zip(jobs, (options.contestants, options.demo_contestants), strict=True):
            limit = out / f"limit-{job.name}.json"
            run([sys.executable, "-m", "comparison.limit", job.write(), limit])
            contest = Contest(job, peers, Path(folder), out, tuple(names.split(",")))
            figures[job.name] = {
                "contestants": contest.run(options.repeats),
                "limit": json.loads(limit.read_text()),
                "job": results.description(job),
            }
        imports = seconds_to_import(Path(sys.executable), options.repeats)
    document = results.document(figures, imports, OURS)
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    results.draw(document, out / "comparison.png")
    print(results.table(document))
    print(f"written: {out}/results.json, {out}/comparison.png")


if __name__ == "__main__":
    main()
