"""From a Plan to something that runs: apply (a live model), emit (a readable script). Reads the Plan, never the search."""
