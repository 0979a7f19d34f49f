"""One rank at one store: its connections, its membership and the phases it awaits."""
