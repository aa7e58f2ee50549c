"""Metrics and losses whose parts, computed anywhere, merge to the value over all samples."""
