"""The order of samples, and the blocks they are read from."""
