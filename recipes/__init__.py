"""Complete named runs (YAML) and the assets of the demo, as package data."""

if __name__ != "tide.recipes":
    raise ImportError(
        "this folder is the package tide.recipes: install the project (pip install -e .) "
        "and import tide.recipes, not recipes"
    )
