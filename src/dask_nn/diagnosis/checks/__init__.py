"""What the facts mean, theme by theme: pure functions from facts to lines."""
