"""What both stages must agree on: tokens, chunks, noise, models and the cache.

Imports neither stage.
"""

if __name__ != "tide.shared":
    raise ImportError(
        "this folder is the package tide.shared: install the project (pip install -e .) "
        "and import tide.shared, not shared"
    )
