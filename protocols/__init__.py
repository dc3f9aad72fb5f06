"""Secure aggregation for federated learning, free of input and output.

Each protocol is one file: the states and steps of a client, the server's generator, and `run`,
which drives every party in one process. `catalogue` lists them by name.
"""
