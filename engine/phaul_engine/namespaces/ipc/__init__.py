"""IPC namespaces (ipc_namespaces(7)): limits, System V objects, POSIX message queues."""
