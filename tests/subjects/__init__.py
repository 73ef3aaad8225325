"""Programs to be moved that check themselves; see README.md beside this file."""
