"""One module per ``specdec`` command, and what they share: loading models, printing results."""
