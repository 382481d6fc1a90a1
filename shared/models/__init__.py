"""Models as native transformers classes: no code from a checkpoint ever runs."""
