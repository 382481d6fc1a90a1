"""The type checker of jaxtyping's import hook (conftest.py): beartype, with an int accepted for a float (PEP 484)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
