"""OpenAI-compatible serving and the sidecar."""
