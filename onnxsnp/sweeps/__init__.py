"""Many plans from one pass over the data: which ones, what they cost and lose, and the one that meets a limit."""
