"""A proxy in front of an endpoint that somebody else runs: relays byte for byte, learns, and speeds up what it may."""
