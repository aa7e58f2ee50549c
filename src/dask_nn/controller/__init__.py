"""Runs on a cluster: forming gangs, watching them, and the graph engine."""
