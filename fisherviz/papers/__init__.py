"""The papers' figures and tables, measured again: a folder per paper, a function per exhibit.

`ledger` knows the exhibits and keeps claims against measurements, `trials` compares optimizers fairly. Nothing is
imported here, so that the command line starts quickly.
"""
