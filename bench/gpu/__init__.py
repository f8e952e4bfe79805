"""One call that checks and measures everything on a GPU."""
