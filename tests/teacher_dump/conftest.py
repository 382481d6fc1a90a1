"""What the tests of stage one share."""

from pathlib import Path

import pytest
from tiny_runs import write_model, write_pairs


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Models and data of this test alone, to be broken or changed."""
    write_model(tmp_path / "teacher", "teacher", seed=1)
    write_model(tmp_path / "student", "student", seed=None)
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path
