"""Symmetric matrices over all probed layers: known by an operator, by examples alone, or read from a file."""
