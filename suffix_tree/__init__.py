"""Online indexes over integer tokens in numba on flat arrays; no torch in here."""
