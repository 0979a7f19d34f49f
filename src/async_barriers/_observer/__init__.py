"""Watching commits, without being a rank."""
