"""Complete jobs, each run by one command."""
