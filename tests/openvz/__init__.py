"""OpenVZ on the test hosts: a stand-in of its commands, and nodes that have them."""

from tests.openvz.node import Node

__all__ = ["Node"]
