"""The commands: each parses its options, does its work, returns the exit code. tools/ has a file for each."""
