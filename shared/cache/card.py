"""README.md of a cache: a data set card that says what it holds, made from the manifest alone.

It is written before the manifest and read by people; nothing in tide parses it.
"""

from pathlib import Path

from .files import atomic_write
from .manifest import Manifest


def write_card(root: str | Path, manifest: Manifest) -> None:
    """Write `root / README.md` atomically. Raises: OutputError."""
    atomic_write(Path(root) / "README.md", card_text(manifest).encode())


def card_text(manifest: Manifest) -> str:
    """The card as Markdown with the Hub's YAML header."""
    totals, signal, noise = manifest.totals, manifest.signal, manifest.noise
    teacher = "none (clean samples only)" if manifest.teacher is None else f"`{manifest.teacher.id}`"
    revision = "" if manifest.teacher is None else f" at `{manifest.teacher.revision}`"
    precision = "" if manifest.teacher is None else f", {manifest.teacher.precision}"
    per_masked = totals.bytes / max(1, totals.masked_positions)
    rows = [
        ("Teacher", teacher + revision + precision),
        ("Data", ", ".join(f"`{s.source}` at `{s.revision}` (licence: {s.licence})" for s in manifest.sources)),
        ("Signal", f"{signal.kind}, k = {signal.top_k}, temperatures {', '.join(map(str, signal.temperatures))}"),
        ("Loss support", signal.support),
        ("Noise", ", ".join(f"{name} = {value}" for name, value in sorted(noise.items()))),
        ("Student tokenizer", f"`{manifest.student.tokenizer_fingerprint}`"),
        ("Block size", str(manifest.block_size)),
        ("Samples, views", f"{totals.samples:,}, {totals.rows:,}"),
        ("Bytes", f"{totals.bytes:,} ({per_masked:.1f} per masked position)"),
        ("Plan", f"`{manifest.plan_hash}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\npretty_name: tide cache\ntags: [tide, distillation, diffusion-language-model]\n"
        "configs:\n- config_name: default\n  data_files: data/*.parquet\n---\n\n"
        "# A teacher's answers, cached by tide\n\n"
        "One row per view (sample x noise draw). The columns are described in docs/cache_format.md of tide-distill, "
        "and "
        "`manifest.json` describes this cache completely; any Parquet reader opens it.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )
