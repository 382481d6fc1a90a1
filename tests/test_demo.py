"""The demo's arithmetic: gains, document-paired z, the table and the picture, on scores made by hand."""

import numpy as np
from tide.demo import (
    ARMS,
    BASELINE,
    CONTROLS,
    DEFAULT_ARMS,
    SIZES,
    DemoSize,
    demo_config,
    demo_jobs,
    draw,
    table,
    verdict,
)
from tide.student_train.comparison import summarise

T = [0.1, 0.5, 0.9]


def _scores(size: DemoSize, shift: dict[str, float], documents: int = 40) -> dict:
    """Every arm's documents are the baseline's, less a shift, plus a little noise of their own."""
    draw_noise = np.random.default_rng(0)
    difficulty = draw_noise.normal(3.0, 0.8, documents)
    scores = {}
    for arm in size.arms:
        for seed in size.seeds:
            values = difficulty - shift.get(arm, 0.0) + draw_noise.normal(0, 0.05, documents)
            scores[arm, seed] = {
                "t": T, "bits_per_byte": [float(values.mean())] * 3, "accuracy": [0.25] * 3,
                "documents": [None, *values[1:].tolist()],
            }  # fmt: skip
    return scores


def test_z_is_paired_by_document_and_positive_when_an_arm_needs_fewer_bits():
    size = DemoSize(("ce", "kl", "calm"), (1, 2, 3))
    result = summarise(_scores(size, {"kl": 0.1, "calm": -0.1}), size.arms, against=[BASELINE])
    kl, calm = (result["arms"][arm]["against"]["ce"] for arm in ("kl", "calm"))
    # Unpaired, documents spread by 0.8 / sqrt(39) = 0.13 would hide a gain of 0.1; paired, the noise is 0.05.
    assert kl["z"] > 5
    assert calm["z"] < -5
    assert all(gain > 0 for gain in kl["gain_by_seed"])
    assert not result["arms"]["ce"]["against"]
    assert result["documents"] == 40


def test_every_control_that_was_run_gets_a_line_of_the_verdict():
    size = DemoSize((*CONTROLS, "kl"), (1, 2, 3))
    lines = verdict(summarise(_scores(size, {"kl": 0.1, "hard-label": 0.3}), size.arms, against=CONTROLS)).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"kl against {control}" for control in CONTROLS]
    assert "+0.1" in lines[0]
    assert "3 of 3 seeds" in lines[0]
    assert "-0.2" in lines[2]
    assert "0 of 3 seeds" in lines[2]


def test_the_table_has_a_row_per_arm_and_the_picture_is_written(tmp_path):
    size = DemoSize(DEFAULT_ARMS, (1, 2))
    result = summarise(_scores(size, {"kl": 0.2}), size.arms, against=["ce", "hard-label"])
    rows = table(result).splitlines()
    assert len(rows) == 2 + len(DEFAULT_ARMS)
    assert rows[2].startswith("| kl |")
    draw(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_full_demo_has_both_ce_baselines_the_control_and_three_seeds():
    assert set(SIZES["full"].arms) == set(ARMS)
    assert set(ARMS) >= {"ce", "ce-fresh", "hard-label", "kl", "tidal", "calm", "reverse-calm", "tide-hybrid"}
    assert len(SIZES["full"].seeds) >= 3
    assert {"ce", "hard-label", "kl", "tide-hybrid"} == set(SIZES["default"].arms)


def test_every_arm_and_seed_is_a_training_of_its_own_with_the_arms_losses(tmp_path):
    size = SIZES["full"]
    jobs = demo_jobs(demo_config(tmp_path, size), tmp_path, size)
    assert [(job.arm, job.seed) for job in jobs] == [(arm, seed) for seed in size.seeds for arm in size.arms]
    assert all(job.config.losses == ARMS[job.arm] for job in jobs)
    assert {job.arm for job in jobs if job.config.train.ce_noise == "fresh"} == {"ce-fresh"}
    assert {(job.cache, job.heldout) for job in jobs} == {(str(tmp_path / "cache"), str(tmp_path / "heldout"))}
