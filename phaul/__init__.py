"""Live migration of running Linux process trees and containers."""

__version__ = "0.1.0"
