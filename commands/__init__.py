"""The subcommands of `tide`, by subject; each parses, calls one function and prints."""
