"""Which device, precision and attention: one answer, whoever asks, whatever NVML and torch say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft  # noqa: F401  it imports bitsandbytes, which reads the GPUs that torch finds
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

import lora_trainer
from lora_trainer.commands import check
from lora_trainer.commands.finetuned import FinetunedModel, open_model
from lora_trainer.config.schema import ModelSection
from lora_trainer.config.settings import Settings
from lora_trainer.errors import UnavailableError
from lora_trainer.machine import Gpu, Machine, read_machine
from lora_trainer.memory_estimate import memory_limit_bytes
from lora_trainer.model import flash, stacks, varlen
from lora_trainer.model.backend import resolve, usable_machine
from lora_trainer.model.ranks import Ranks
from lora_trainer.plan import Plan, process_count
from lora_trainer.redaction import Redaction
from lora_trainer.run.events import Planned
from lora_trainer.run.protocol import WorkerSpec
from lora_trainer.serve.gauges import Gauges, Reading, open_nvml, read_gpus, read_host
from lora_trainer.serve.responses import health_view, status_view
from lora_trainer.serve.run_state import RunState
from lora_trainer.supervise.supervisor import Supervisor
from lora_trainer.train import dry_run
from lora_trainer.train.session import open_session
from lora_trainer.train.worker import run
from support.trained_run import TEXT, settings_of

MAKE_PLAN = dry_run.make_plan
BASE = LlamaConfig()
UNUSABLE = "the GPU cannot be used"
NVML_ERROR = type("NVMLError", (Exception,), {})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets NVML list some GPUs of 24 GB, and torch use some of them."""

    def play(listed: int, usable: int, capability: tuple[int, int] = (9, 0)) -> None:
        nvml = ModuleType("pynvml")
        nvml.__dict__.update(
            NVMLError=NVML_ERROR,
            NVML_TEMPERATURE_GPU=0,
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlSystemGetDriverVersion=lambda: "580.65.06",
            nvmlDeviceGetCount=lambda: listed,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda index: f"GPU {index}",
            nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=24 << 30, used=0),
            nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=0),
            nvmlDeviceGetTemperature=lambda *_: 40,
            nvmlDeviceGetPowerUsage=lambda _: 1000,
            nvmlDeviceGetCudaComputeCapability=lambda _: capability,
        )
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU 0")

    for name in ("CUDA_VISIBLE_DEVICES", "LORA_STACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stacks, "installed", lambda: "current")
    return play


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_of(tmp_path, TEXT, "--bf16=true", "--health_port=0")


def consumers(settings: Settings, output: Path) -> dict:
    """Return all that begin to compute, by name: each either works or is refused."""
    spec = WorkerSpec(settings.config, output, "run", rank=1, ranks=2, store="never met")
    return {
        "train": lambda: open_session(settings.config, output, lambda _: None),
        "a second rank": lambda: run(spec, lambda _: None, SimpleNamespace()),
        "check": lambda: check.check_all(settings),
        "evaluate, chat": lambda: open_model(FinetunedModel("base", settings.config)),
    }


@pytest.mark.parametrize(
    ("listed", "usable", "what"),
    [(2, 0, UNUSABLE), (2, 1, UNUSABLE), (0, 1, "NVML does not list the GPU")],
    ids=["old driver", "one of two", "none in NVML"],
)
def test_where_nvml_and_torch_disagree_everything_is_refused_alike(
    listed, usable, what, gpus, settings, tmp_path
):
    gpus(listed, usable)
    asking = consumers(settings, tmp_path / "run")
    if usable < listed and usable:  # one GPU is enough where one process asks
        asking = {name: asking[name] for name in ("a second rank", "check")}
    for name, ask in asking.items():
        with pytest.raises(UnavailableError, match=what) as refused:
            ask()
        assert "--cpu" in refused.value.problems[0].remedy, name


NVML_MODULE = """
class NVMLError(Exception):
    pass


class Memory:
    total, used = 24 << 30, 0


ANSWERS = {
    "GetCount": 2, "GetName": "GPU", "GetMemoryInfo": Memory, "GetCudaComputeCapability": (9, 0),
    "GetDriverVersion": "580.65.06",
}


def __getattr__(name):
    if not name.startswith("nvml"):
        raise AttributeError(name)
    return lambda *_: ANSWERS.get(name.removeprefix("nvmlDevice").removeprefix("nvmlSystem"))
"""


# The log's filter is not waited for beyond its patience, which a busy machine may use up.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.usefixtures("gpus")
def test_the_supervisor_starts_a_worker_a_gpu_and_reports_one_refusal(
    settings, tmp_path, monkeypatch
):
    (tmp_path / "nvml").mkdir()
    (tmp_path / "nvml" / "pynvml.py").write_text(NVML_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nvml"))
    monkeypatch.syspath_prepend(tmp_path / "nvml")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    events: list = []
    supervisor = Supervisor(settings, lambda event, _: events.append(event))
    assert supervisor._processes == 2
    with pytest.raises(UnavailableError, match=UNUSABLE):
        supervisor.run()
    monkeypatch.delitem(sys.modules, "pynvml")
    kinds = [event.kind for event in events]
    assert kinds.count("failed") == kinds.count("run_started") == 1
    assert not {"restart", "plan"} & set(kinds)
    # Neither data nor a model was read before.
    assert {event.phase for event in events if event.kind == "phase"} == {"starting"}
    assert events[-1].exit_code == 69


def statuses(plan: Plan) -> tuple[dict, dict]:
    live = RunState(Redaction(), 60)
    live.add(Planned(plan=plan.to_dict()))
    gauges = Gauges(Path.cwd())
    gauges.keep(Reading(0.0, read_host(Path.cwd()), read_gpus(open_nvml())))
    return status_view(live, gauges), health_view(live, gauges)


@pytest.mark.parametrize(("slowness", "used"), [(400.0, "float32"), (0.5, "bfloat16")])
def test_where_gpus_are_hidden_all_agree_on_the_cpu(
    slowness, used, gpus, settings, tmp_path, monkeypatch
):
    gpus(2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("lora_trainer.model.precision.bfloat16_slowness", lambda: slowness)
    config, machine = settings.config, usable_machine(read_machine(), 2)
    session = open_session(config, tmp_path / "run", lambda _: None)
    opened = open_model(FinetunedModel("base", config))
    shown = dry_run.preview(config, session.source, session.splits)
    assert process_count(config, machine) == shown.processes == session.plan.processes == 1
    assert machine.device == shown.device == session.plan.device == session.causal.device == "cpu"
    assert opened.causal.device == "cpu"
    assert memory_limit_bytes(machine, 1) == machine.memory_bytes
    assert shown.memory_limit_bytes == session.plan.memory_limit_bytes == machine.memory_bytes
    assert shown.precision == session.plan.precision == opened.causal.precision == used
    assert shown.attention == session.plan.attention
    status, health = statuses(session.plan)
    assert (status["device"], status["gpu_count"], health["cuda_available"]) == ("cpu", 0, False)


def test_where_torch_can_use_the_gpus_all_agree_on_them(gpus, settings, tmp_path, monkeypatch):
    gpus(2, 2)
    monkeypatch.setattr(flash, "pytorch_kernel", lambda device, *_: f"sdpa on {device}")
    monkeypatch.setattr(varlen, "of_pytorch", lambda: "")
    plans = []
    monkeypatch.setattr(dry_run, "make_plan", lambda *a, **k: plans.append(MAKE_PLAN(*a, **k)))
    with pytest.raises(AttributeError):  # there is no plan to print
        check.check_all(settings)
    (plan,) = plans
    assert (plan.device, plan.processes, plan.memory_limit_bytes) == ("cuda", 2, 24 << 30)
    assert (plan.precision, plan.attention) == ("bfloat16", "packed sdpa on cuda")
    status, health = statuses(plan)
    assert (status["device"], status["gpu_count"], health["cuda_available"]) == ("cuda", 2, True)
    second = Ranks(1, 1)
    backend = resolve(settings.config.model, usable_machine(read_machine(), 2), BASE, second)
    assert (backend.device_name, backend.dtype) == ("cuda:1", torch.bfloat16)


def test_only_the_gpus_that_are_used_decide(gpus):
    strong, weak = Gpu(0, "strong", 80 << 30, (9, 0)), Gpu(1, "weak", 16 << 30, (7, 5))
    machine = Machine(8, 64 << 30, (strong, weak))
    gpus(2, 2)
    one, both = usable_machine(machine, 1), usable_machine(machine, 2)
    assert (memory_limit_bytes(one, 1), memory_limit_bytes(both, 2)) == (80 << 30, 16 << 30)


def test_ranks_that_measured_otherwise_agree_on_what_all_can(monkeypatch):
    monkeypatch.setattr("lora_trainer.model.precision.bfloat16_slowness", lambda: 1.0)

    class Lowest(Ranks):
        def least(self, value: int) -> int:
            return min(value, 1)

    machine = Machine(2, 8 << 30, ())
    asked = ModelSection(bf16=True)
    assert resolve(asked, machine, BASE).precision == "bfloat16"
    assert resolve(asked, machine, BASE, Lowest(0, 2)).precision == "float16"


@pytest.mark.parametrize(
    ("config", "attention", "packed"),
    [
        (Gemma2Config(attn_logit_softcapping=50.0), "eager", "packed eager"),
        (BASE, "sdpa", "packed sdpa"),
    ],
    ids=["caps its scores", "plain"],
)
def test_a_model_that_caps_its_scores_has_no_kernel_of_pytorch(config, attention, packed):
    backend = resolve(ModelSection(), Machine(2, 8 << 30, ()), config)
    assert backend.attention == attention
    assert backend.packed.startswith(packed)


def test_nothing_else_asks_torch_whether_there_is_a_gpu():
    source = Path(lora_trainer.__file__).parent
    asking = ("cuda.is_available", "cuda.device_count", "get_device_capability")
    files = {
        path.name
        for path in source.rglob("*.py")
        if any(question in path.read_text() for question in asking)
    }
    assert files == {"backend.py", "checkpoint.py"}  # the latter counts random states
