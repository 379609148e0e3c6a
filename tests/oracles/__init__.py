"""Brute force in float64 that shares no code with the package under test.

Every quantity is written as the papers define it: sums over examples and labels, dense matrices, loops.
"""
