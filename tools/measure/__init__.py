"""What tools/benchmark.py is made of: cases, their inputs, processes that take turns, tables."""
