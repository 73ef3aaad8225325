"""The agent at the destination."""
