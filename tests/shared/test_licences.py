"""Licences as cards declare them."""

import pytest
from tide.shared.licences import folder_licence, licence_of_card


@pytest.mark.parametrize(
    ("declared", "licence"),
    [
        ("mit", "mit"), (" mit ", "mit"), (["mit", "cc-by-4.0"], "mit, cc-by-4.0"), (None, None), ([], None), (3, None),
        ("", None), ("a\x1b[31mb", None), (["mit", 3, "x\ny"], "mit"),
    ],
)  # fmt: skip
def test_a_declared_licence_is_one_line_of_printable_text(declared, licence):
    assert licence_of_card(declared) == licence


def test_a_folder_without_a_card_or_with_an_endless_one_declares_nothing(tmp_path):
    assert folder_licence(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * 2**20)
    assert folder_licence(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert folder_licence(tmp_path) == "mit"
