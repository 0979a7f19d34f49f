"""Agreeing on a step to stop at, beside a rank's other calls."""
