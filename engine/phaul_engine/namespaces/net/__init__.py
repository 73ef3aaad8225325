"""Network namespaces (network_namespaces(7)): devices, addresses, routes, rules, neighbours, settings, filters."""
