"""README.md of a published student: a model card for people and for the Hub.

What it scores, what it was trained from and how, whose licences bear on it, what it cost, and how it is loaded. Names
come from manifests and results that may be a stranger's: they are quoted for YAML and inert in Markdown.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..shared.cache.card import Licences, one_line, settings_text, table
from ..shared.cache.trained_from import TrainedFrom
from ..shared.licences import hub_fields
from ..shared.shown_text import markdown_text
from .evaluation_scores import TaskScore

_MAX_NAME_CHARS = 100


@dataclass(frozen=True)
class Cost:
    """What the publisher says a student cost; None: not known."""

    gpu_hours: float | None = None
    hardware: str | None = None
    carbon_kg: float | None = None


@dataclass(frozen=True)
class StudentFacts:
    """Everything that a card tells.

    Args:
        repository: owner/name on the Hub. origin: of the cache. licences: of the teacher and the data.
        start: hub id of the checkpoint that training began from; None: a local one. start_licence: of it.
        settings: of the run, as `run_identity` names them. steps: taken.
        model_class: transformers' own class that reads the weights. block_size, mask_id, num_parameters: of the model.
        scores: of benchmarks. heldout: the last evaluation on unseen documents, by name.
    """

    repository: str
    origin: TrainedFrom
    licences: Licences
    start: str | None
    start_licence: str | None
    settings: Mapping[str, Any]
    steps: int
    model_class: str
    model_type: str
    block_size: int
    mask_id: int
    num_parameters: int
    scores: Sequence[TaskScore]
    heldout: Mapping[str, float]
    cost: Cost


def public_card(facts: StudentFacts) -> str:
    """The card as Markdown with the Hub's YAML front matter."""
    header = yaml.safe_dump(_front_matter(facts), sort_keys=False, width=2**16)
    evaluation = _evaluation(facts)
    sections = [
        f"---\n{header}---\n",
        "# A block-diffusion language model, distilled by tide\n",
        "Trained offline from a cache of a teacher's answers: it writes block by block, and inside a block in any "
        "order.\n",
        f"## Evaluation\n\n{evaluation}\n" if evaluation else "",
        *(f"## {title}\n\n{table(rows)}\n" for title, rows in _sections(facts) if rows),
        _HOW.replace("OWNER/NAME", facts.repository).replace("MODEL_CLASS", facts.model_class)
        .replace("MODEL_TYPE", facts.model_type).replace("BLOCK", str(facts.block_size))
        .replace("MASK_ID", str(facts.mask_id)),
    ]  # fmt: skip
    return "\n".join(section for section in sections if section)


_HOW = """## How to use it

```sh
tide generate --student OWNER/NAME "Say hello."
```

Plain transformers reads it without remote code. Name the class: `AutoModel` does not know the model type `MODEL_TYPE`,
which is there for the evaluators of dLLM, and transformers warns that it is another one. Always give an attention mask;
without one, attention would be causal.

```python
import torch
from transformers import AutoTokenizer, MODEL_CLASS

tokenizer = AutoTokenizer.from_pretrained("OWNER/NAME")
model = MODEL_CLASS.from_pretrained("OWNER/NAME", dtype=torch.float32).eval()
ids = torch.tensor([tokenizer("Say hello.")["input_ids"] + [MASK_ID] * BLOCK])  # a block of masks to be filled
block = torch.arange(ids.shape[1]) // BLOCK
mask = (block[:, None] >= block[None, :])[None, None]  # a token sees its own block and the earlier ones
with torch.no_grad():
    logits = model(ids, attention_mask=mask).logits  # read at the masks, no shift
```
"""


def _front_matter(facts: StudentFacts) -> dict[str, Any]:
    licences = [*facts.licences.all, *([facts.start_licence] if facts.start_licence else [])]
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **hub_fields([one_line(licence) for licence in licences]),
        "tags": ["tide", "distillation", "diffusion-language-model", "block-diffusion"],
    }
    if facts.start is not None:
        fields["base_model"] = facts.start
    if facts.origin.address is not None:
        fields["datasets"] = [one_line(facts.origin.address)]
    if facts.cost.carbon_kg is not None:
        fields["co2_eq_emissions"] = {"emissions": 1000 * facts.cost.carbon_kg, "source": "stated by the publisher"}
    results = []
    for score in facts.scores:  # lines of the Hub's own table of results
        name = one_line(score.name, _MAX_NAME_CHARS)
        slug = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "task"
        results.append({
            "task": {"type": "text-generation"}, "dataset": {"name": name, "type": slug},
            "metrics": [{"type": one_line(score.metric, _MAX_NAME_CHARS), "value": score.value}],
        })  # fmt: skip
    if results:
        fields["model-index"] = [{"name": facts.repository.split("/")[1], "results": results}]
    return fields


def _evaluation(facts: StudentFacts) -> str:
    lines = []
    if facts.scores:
        lines += ["| task | metric | value | standard error | documents |", "|---|---|---|---|---|"]
    for score in facts.scores:
        name, metric = (markdown_text(text, max_chars=_MAX_NAME_CHARS) for text in (score.name, score.metric))
        error = "" if score.stderr is None else f"{score.stderr:.4g}"
        count = "" if score.n is None else f"{score.n:,}"
        lines.append(f"| {name} | {metric} | {score.value:.4g} | {error} | {count} |")
    if facts.heldout:
        bits, right = facts.heldout["heldout_bits_per_byte"], facts.heldout["heldout_accuracy"]
        lines += [""] * bool(lines)
        lines.append(
            f"On unseen documents, the mean over diffusion times: {bits:.3f} bits per byte; {100 * right:.1f} % of the "
            "masked tokens guessed right."
        )
    return "\n".join(lines)


def _sections(facts: StudentFacts) -> list[tuple[str, Mapping[str, str]]]:
    origin, licences, cost = facts.origin, facts.licences, facts.cost
    teacher = {"Model": "none"}
    if origin.teacher is not None:
        teacher = {
            "Model": origin.teacher.id, "Revision": origin.teacher.revision, "Precision": origin.teacher.precision,
            "Weights (fingerprint)": origin.teacher.weight_fingerprint, "Licence": licences.teacher or "unknown",
        }  # fmt: skip
    sources = enumerate(zip(origin.sources, licences.data, strict=True), 1)
    where = f"{origin.address} at {origin.commit}" if origin.address else "not on the Hub, as far as this run knows"
    spent = {
        "GPU-hours": None if cost.gpu_hours is None else f"{cost.gpu_hours:g}", "Hardware": cost.hardware,
        "Carbon": None if cost.carbon_kg is None else f"{cost.carbon_kg:g} kg CO2 equivalent",
    }  # fmt: skip
    numbers = sorted({name.split(".")[1] for name in facts.settings if name.startswith("losses.")}, key=int)
    losses = {f"Loss {int(n) + 1}": settings_text(_below(f"losses.{n}.", facts.settings)) for n in numbers}
    train = _below("train.", facts.settings)
    return [
        ("Model", {
            "Parameters": f"{facts.num_parameters:,}",
            "Started from": facts.start or "a checkpoint that is not on the Hub, or random weights",
            "Its licence": facts.start_licence or "not stated", "Block size": str(facts.block_size),
            "Mask token": str(facts.mask_id),
        }),
        ("Teacher", teacher),
        ("Cache", {
            "Data set": where, "Manifest": origin.manifest_hash, "Plan": origin.plan_hash, "Signal": origin.signal,
            "Samples, views": f"{origin.samples:,}, {origin.views:,}", "Noise": settings_text(origin.noise),
        }),
        ("Data", {f"Source {number}": f"{source.source} at {source.revision} (licence: {licence})"
                  for number, (source, licence) in sources}),
        ("Training", {**losses, "Steps": f"{facts.steps:,}", **{name: str(value) for name, value in train.items()}}),
        ("What it cost", {name: value for name, value in spent.items() if value is not None}),
    ]  # fmt: skip


def _below(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one section that have a value."""
    return {n.removeprefix(prefix): v for n, v in settings.items() if n.startswith(prefix) and v is not None}
