"""What ranks say to a store, and why that is safe; no thread, no event loop, no torch."""
