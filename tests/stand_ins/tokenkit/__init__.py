"""Stands in for github.com/bminixhofer/tokenkit, which PyPI does not carry."""
