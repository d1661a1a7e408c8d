"""Implementations of the semantic ops, by provider, and the registry that chooses among them."""
