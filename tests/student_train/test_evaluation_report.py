"""The report over results: numbers worked by hand, what is left out, and what is said to differ from the paper."""

import math
from typing import Any

import pytest
from tide.shared.config import DecodingConfig, to_tree
from tide.student_train import evaluation_report
from tide.student_train.evaluation_report import describe, markdown, picture, write_report
from tide.student_train.tide8 import BENCHMARKS, PAPER_COLUMNS, Benchmark

FACTS: dict[str, Any] = {"suite": "tide8", "limit": None, "left_out": {}, "code_execution": None, "failed": {}}
EIGHT = [b for b in BENCHMARKS if b.in_suite]


def made(benchmark: Benchmark, scores: list[float], **settings: Any) -> dict[str, Any]:
    """A result as evaluate.py makes it."""
    decoding = to_tree(DecodingConfig(**{**benchmark.decoding, "prompt_alignment": "boundary", **settings}))
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return {
        "score": mean, "stderr": math.sqrt(variance / len(scores)), "documents": len(scores), "seconds": 1.0,
        "truncated_prompts": 0, "settings": {"decoding": decoding},
        "scores": [["task", number, score] for number, score in enumerate(scores)],
    }  # fmt: skip


def test_scores_errors_and_paired_gains_by_hand():
    gsm8k = next(b for b in EIGHT if b.name == "gsm8k_cot")
    ours, theirs = made(gsm8k, [1.0, 1.0, 0.0, 1.0]), made(gsm8k, [1.0, 0.0, 0.0, 0.0])
    report = describe(FACTS, [gsm8k], {"student": {gsm8k.name: ours}, "compare": {gsm8k.name: theirs}})
    row = report["students"]["student"]["gsm8k_cot"]
    assert (row["score"], row["documents"]) == (75.0, 4)
    assert row["stderr"] == pytest.approx(25.0)  # sqrt(0.25 / 4)
    assert report["gain"]["gsm8k_cot"]["gain"] == pytest.approx(50.0)
    assert report["gain"]["gsm8k_cot"]["stderr"] == pytest.approx(100 * math.sqrt(1 / 3 / 4))
    assert report["average"] == {"student": None, "compare": None}
    text = markdown(report)
    assert "| GSM8K | 75.00 ± 25.00 | 25.00 ± 25.00 | +50.00 ± 28.87 | 59.60 | 45.56 |" in text
    assert "GSM8K: 4 of 1,319 documents" in text


def test_the_average_is_of_all_eight_or_none():
    results = {b.name: made(b, [1.0, 0.0]) for b in EIGHT}
    report = describe(FACTS, EIGHT, {"student": results})
    assert report["average"]["student"]["score"] == pytest.approx(50.0)
    assert report["average"]["student"]["stderr"] == pytest.approx(50.0 / math.sqrt(8))
    single = results | {"mmlu": made(EIGHT[0], [1.0, 1.0]) | {"stderr": None}}
    assert describe(FACTS, EIGHT, {"student": single})["average"]["student"]["stderr"] is None
    assert describe(FACTS, EIGHT[1:], {"student": results | {"mmlu": {}}})["average"]["student"] is None


def test_prompts_that_were_cut_stand_in_the_table_and_below_it():
    row = EIGHT[0]
    ours, theirs = made(row, [1.0, 0.0]) | {"truncated_prompts": 1200}, made(row, [1.0, 1.0])
    report = describe(FACTS, [row], {"student": {row.name: ours}, "compare": {row.name: theirs}})
    assert report["students"]["student"][row.name]["truncated_prompts"] == 1200
    assert report["students"]["compare"][row.name]["truncated_prompts"] == 0
    text = markdown(report)
    assert f"| {row.title} | 50.00 ± 50.00 (1,200 cut) | 100.00 ± 0.00 |" in text
    assert "(n cut): so many prompts lost their beginning" in text
    assert f"{row.title}, this student: 1,200 prompts lost their beginning" in text
    assert "cut)" not in markdown(describe(FACTS, [row], {"student": {row.name: theirs}}))


def test_documents_that_differ_are_not_paired():
    row = EIGHT[0]
    other = made(row, [1.0, 0.0]) | {"scores": [["task", 5, 1.0], ["task", 6, 0.0]]}
    report = describe(FACTS, [row], {"student": {row.name: made(row, [1.0, 0.0])}, "compare": {row.name: other}})
    assert report["gain"][row.name] is None
    assert markdown(report)


def test_departures_from_the_protocol_are_named():
    mmlu, bbh, code = EIGHT[0], EIGHT[4], EIGHT[6]
    results = {
        mmlu.name: made(mmlu, [1.0] * 14042),
        bbh.name: made(bbh, [0.0, 1.0], steps=64, threshold=0.9, prompt_alignment="training")
        | {"truncated_prompts": 3},
    }
    facts = {**FACTS, "limit": 2, "left_out": {code.name: "needs leave"}}
    lines = describe(facts, [mmlu, bbh], {"student": results})["differences"]
    for wanted in (
        "a limit of 2 documents", "HumanEval: not run (needs leave)", "decoding.steps = 64, not the protocol's: BBH",
        "decoding.threshold = 0.9", "blocks count from the prompt's first token", "BBH: 2 of 6,511 documents",
        "BBH, this student: 3 prompts lost their beginning", "MMLU: lm-eval's own reading",
    ):  # fmt: skip
        assert any(wanted in line for line in lines), (wanted, lines)
    assert not any("MMLU: 14,042" in line for line in lines), "a whole data set is nothing to tell"


def test_all_three_files_are_written_also_for_a_single_document(tmp_path):
    row = EIGHT[2]
    one = made(row, [1.0, 1.0]) | {"stderr": None, "documents": 1}
    report = write_report(tmp_path, FACTS, [row], {"student": {row.name: one}})
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "| HellaSwag | 100.00 |" in (tmp_path / "evaluation.md").read_text()
    assert len(picture(report)) > 1000
    assert all(len(b.paper) == len(PAPER_COLUMNS) for b in EIGHT)


def test_without_any_result_there_is_no_picture(tmp_path):
    report = write_report(
        tmp_path, {**FACTS, "failed": {"student/mmlu": "no | data\nhere"}}, EIGHT[:1], {"student": {}}
    )
    assert not (tmp_path / "evaluation.png").exists()
    assert "- student/mmlu: no | data here" in markdown(report)


def test_the_picture_shows_a_dot_with_its_interval_where_a_student_was_scored_and_nothing_where_not(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation_report, "png_bytes", lambda figure, alt: drawn.append((figure, alt)) or b"")
    one, two = EIGHT[:2]
    results = {
        "student": {row.name: made(row, [1.0, 0.0, 0.0, 1.0]) for row in (one, two)},
        "compare": {two.name: made(two, [0.0, 0.0, 0.0, 1.0])},
    }
    report = describe(FACTS, [one, two], results)
    picture(report)
    (figure, alt), axes = drawn[0], drawn[0][0].axes[0]
    dots = [container.lines[0].get_data() for container in axes.containers]
    assert [places.tolist() for places, _ in dots] == [[-0.12, 0.88], [1.12]]
    assert [scores.tolist() for _, scores in dots] == [[50.0, 50.0], [25.0]]
    (low, high), _ = axes.containers[0].lines[2][0].get_segments()
    error = report["students"]["student"][one.name]["stderr"]
    assert (low[1], high[1]) == pytest.approx((50 - error, 50 + error))
    said = " ".join(text.get_text() for text in figure.texts)
    assert "plus and minus one standard error over documents" in said
    assert "plus and minus one standard error over documents" in alt
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"this student", "CE-only student"} <= set(labels)
