"""A barrier of collectives: the process group, the calls in their order, and the arrivals."""
