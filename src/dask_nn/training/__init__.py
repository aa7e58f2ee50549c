"""One rank of a run: it receives a communicator and a block reader, and knows nothing of Dask."""
