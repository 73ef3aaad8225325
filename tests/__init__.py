"""The tests, and the tools they share: `tests.hosts` (hosts on one machine, the auditor) and `tests.subjects`."""
