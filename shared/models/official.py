"""Configurations saved with the fields that official classes, and transformers 4, read.

transformers 5 writes `rope_parameters`; a reader of version 4 overlooks that field and falls back to a default base
without a word. transformers 5 reads the older fields just as well, so those are what is written. Architectures whose
official class has names and switches of its own list both in a table.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM


def register(*classes: tuple[Any, Any]) -> None:
    """Tell transformers' Auto classes of configurations and their models; again is harmless."""
    for config, model in classes:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


class OfficialRope:
    """Mixin before a transformers configuration: `rope_theta`, `rope_scaling`, `partial_rotary_factor` as fields."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration with its rotary settings as separate fields."""
        tree: dict[str, Any] = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        rope = dict(tree.pop("rope_parameters", None) or {})
        fields = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        scaled = rope.get("rope_type", "default") != "default"
        return tree | fields | {"rope_scaling": rope if scaled else None}


class OfficialFields(OfficialRope):
    """Mixin for an official class with names and switches of its own; both tables are read from the subclass."""

    official_names: Mapping[str, str] = {}
    """Official field -> field of the transformers class; also part of the subclass's `attribute_map`."""
    computed: Mapping[str, Any] = {}
    """Switches of the official class with the value that the released checkpoints have, the only one computed here."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in self.computed.items():
            given = kwargs.get(name, getattr(self, name, value))
            if given != value:
                raise ValueError(f"{name} = {given!r}: {type(self).__name__} is computed with {value!r} only")
        for official, native in self.official_names.items():
            if official in kwargs:  # before the transformers class derives other fields from these
                setattr(self, native, kwargs.pop(official))
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def to_dict(self) -> dict[str, Any]:
        """The official names, so that the official class reads what is saved here."""
        tree = super().to_dict()
        for official, native in self.official_names.items():
            if native in tree:
                tree[official] = tree.pop(native)
        return tree
