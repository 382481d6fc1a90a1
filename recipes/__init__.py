"""Complete named runs (YAML) and the assets of the demo, as package data."""
