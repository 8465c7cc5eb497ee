"""Verification rules: what of a tree the target would have produced itself."""
