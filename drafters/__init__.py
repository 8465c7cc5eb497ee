"""Drafters: each guesses the next tokens of a request as a tree. One module per family, no shared base class."""
