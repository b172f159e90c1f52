"""What Prometheus reads: parsed by its own parsers, named by its conventions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from lora_trainer.run.events import RanksMeasured
from lora_trainer.serve.prometheus import JSON_TYPE, OPENMETRICS_TYPE, TEXT_TYPE, expose, negotiate
from lora_trainer.serve.responses import metrics_view
from support.live_runs import RANKS, full_run, gauges_of, live_run
from support.run_events import PLAN, RUN, START, saved, stepped

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
PARSERS = {TEXT_TYPE: parse_text, OPENMETRICS_TYPE: parse_openmetrics}
UNITS = (
    "seconds", "bytes", "ratio", "celsius", "watts", "info", "total", "steps", "step", "loss",
    "epoch", "rate", "norm", "scale", "perplexity", "phase", "code", "per_second",
)  # fmt: skip
FLAGS = {"lora_trainer_healthy", "lora_trainer_training", "lora_trainer_running"}


def samples(live, kind=OPENMETRICS_TYPE):
    text = expose(live, gauges_of(), kind).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in PARSERS[kind](text)
        for sample in family.samples
    }


def named(live, name, kind=OPENMETRICS_TYPE):
    (value,) = [v for (known, _), v in samples(live, kind).items() if known == name]
    return value


@pytest.mark.parametrize("kind", PARSERS)
def test_both_formats_are_read_by_prometheus_own_parser(kind):
    live = live_run(*RUN)
    assert named(live, "lora_trainer_loss", kind) == 1.0
    assert named(live, "lora_trainer_step", kind) == 40
    assert named(live, "lora_trainer_tokens_total", kind) == 4000
    assert named(live, "lora_trainer_eval_loss", kind) == 0.25


def test_both_formats_tell_the_same(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 100.0)  # the age of a checkpoint grows
    one, other = samples(full_run()), samples(full_run(), TEXT_TYPE)
    assert one.keys() == other.keys()
    assert {key for key in one if one[key] != other[key] and not math.isnan(one[key])} == set()


def test_names_follow_the_conventions():
    for name, _ in samples(full_run()):
        assert re.fullmatch(r"lora_trainer_[a-z0-9_]+", name)
        assert name in FLAGS or name.removeprefix("lora_trainer_").endswith(UNITS), name


def test_loss_scale_is_exposed_where_there_is_one():
    live = live_run(*RUN, replace(stepped(41), loss_scale=1024.0, skipped_steps=3))
    assert named(live, "lora_trainer_loss_scale") == 1024.0
    assert named(live, "lora_trainer_skipped_steps_total") == 3
    figures = metrics_view(live, gauges_of())
    assert (figures["loss_scale"], figures["skipped_steps"]) == (1024.0, 3)
    assert "lora_trainer_loss_scale" not in {name for name, _ in samples(live_run(*RUN))}
    assert metrics_view(live_run(*RUN), gauges_of())["loss_scale"] is None


def test_what_is_not_known_has_no_sample():
    names = {name for name, _ in samples(live_run(START))}
    assert "lora_trainer_running" in names
    absent = {"loss", "eval_loss", "remaining_seconds", "planned_steps", "progress_ratio"}
    assert names.isdisjoint({f"lora_trainer_{name}" for name in absent})
    gpu = {name for name in names if name.startswith("lora_trainer_gpu_")}
    assert "lora_trainer_gpu_utilization_ratio" not in gpu
    assert "lora_trainer_gpu_power_watts" in gpu


def test_loss_that_is_not_finite_is_exposed_as_such():
    live = live_run(START, PLAN, stepped(1, loss=float("nan")))
    assert math.isnan(named(live, "lora_trainer_loss"))
    assert named(live, "lora_trainer_healthy") == 0


def test_exactly_one_phase_is_the_present_one():
    phases = {
        dict(labels)["lora_trainer_phase"]: value
        for (name, labels), value in samples(live_run(*RUN[:6])).items()
        if name == "lora_trainer_phase"
    }
    assert [phase for phase, value in phases.items() if value] == ["training"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", JSON_TYPE),
        ("*/*", JSON_TYPE),
        ("text/html,application/xhtml+xml,*/*;q=0.8", JSON_TYPE),
        ("text/plain", TEXT_TYPE),
        ("application/openmetrics-text", OPENMETRICS_TYPE),
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2",
            OPENMETRICS_TYPE,
        ),
        ("application/json;q=0.1, text/plain;q=0.9", TEXT_TYPE),
        ("text/plain;q=0", JSON_TYPE),
        ("text/plain;q=nonsense, ;;,", JSON_TYPE),
    ],
)
def test_format_is_the_one_that_is_asked_for(accept, kind):
    assert negotiate(accept) == kind


def test_each_rank_has_its_speed_and_its_memory():
    values = samples(live_run(START, PLAN, RanksMeasured(step=1, ranks=RANKS, slowest=1)))
    assert values["lora_trainer_rank_tokens_per_second", (("rank", "1"),)] == 50.0
    assert values["lora_trainer_rank_memory_bytes", (("rank", "0"),)] == 7


def series() -> set[str]:
    ranks = RanksMeasured(step=40, ranks=RANKS, slowest=1)
    both = [*samples(full_run()), *samples(live_run(*RUN[:-2], ranks))]
    return {name for name, _ in both} | {"lora_trainer_gpu_utilization_ratio"}


def used(text: str) -> set[str]:
    return set(re.findall(r"\blora_trainer_[a-z0-9_]+", text))


def test_grafana_dashboards_use_only_series_that_exist():
    files = sorted((DEPLOY / "grafana").glob("*.json"))
    assert files
    for path in files:
        board = json.loads(path.read_text())
        queries = [
            target["expr"] for panel in board["panels"] for target in panel.get("targets", ())
        ] + [variable.get("query", "") for variable in board["templating"]["list"]]
        names = used(json.dumps(queries))
        assert names, path
        assert names <= series(), path
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids))


def test_alert_rules_use_only_series_that_exist():
    import yaml

    files = sorted((DEPLOY / "prometheus").glob("*.yml"))
    assert files
    for path in files:
        groups = yaml.safe_load(path.read_text())["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert rules
        for rule in rules:
            names = used(rule["expr"])
            assert names, rule
            assert names <= series(), rule
            assert rule["annotations"].keys() >= {"summary", "description"}


def test_the_age_of_the_newest_checkpoint_is_in_both_forms(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 100.0)
    live = live_run(START, PLAN, stepped(4), saved(4))
    assert samples(live)["lora_trainer_checkpoint_age_seconds", ()] == 96.0
    assert metrics_view(live, gauges_of())["checkpoint_age_seconds"] == 96.0
    none = live_run(START, PLAN, stepped(4))
    assert ("lora_trainer_checkpoint_age_seconds", ()) not in samples(none)
    assert metrics_view(none, gauges_of())["checkpoint_age_seconds"] is None
