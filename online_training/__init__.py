"""Drafter training from traces, offline and online."""
