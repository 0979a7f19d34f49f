"""How requests reach a store: sockets of our own to a TCPStore, worker threads to all others."""
