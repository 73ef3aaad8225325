"""Mount namespaces (mount_namespaces(7))."""
