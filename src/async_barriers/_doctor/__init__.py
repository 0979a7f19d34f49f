"""The measurements of a job's barriers, and what they mean."""
