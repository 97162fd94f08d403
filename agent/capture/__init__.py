"""Watching what the capture pipelines produce."""
