"""How configurations are saved: with the rotary fields that official classes, and transformers 4, read.

transformers 5 writes `rope_parameters`; a reader of version 4 overlooks that field and falls back to a default base
without a word. transformers 5 reads the older fields just as well, so those are what is written.
"""

from typing import Any


class OfficialRope:
    """Mixin before a transformers configuration: `rope_theta`, `rope_scaling`, `partial_rotary_factor` as fields."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration with its rotary settings as separate fields."""
        tree: dict[str, Any] = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        rope = dict(tree.pop("rope_parameters", None) or {})
        fields = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        scaled = rope.get("rope_type", "default") != "default"
        return tree | fields | {"rope_scaling": rope if scaled else None}
