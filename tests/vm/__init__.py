"""Virtual machines with other kernels: see docs/testing.md."""
