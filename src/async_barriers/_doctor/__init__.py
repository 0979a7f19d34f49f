"""What is measured of a job's barriers, and what is said about it."""
