"""What proves that a backend keeps its promises; for tests, here and in other projects."""
