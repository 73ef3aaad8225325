"""The agent at the source."""
