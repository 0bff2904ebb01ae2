"""Files that hold weights: readers and writers that believe nothing a file says, and never put half a file in place."""
