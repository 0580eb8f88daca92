"""Slow twins of the numeric functions: lists and floats, short enough to compare with a paper."""
