"""What can be told to watch a run."""
