"""Clusters to train on: started here, or connected to."""
