"""Search: fill the holes of a workflow with values, run it, read the metrics back."""
