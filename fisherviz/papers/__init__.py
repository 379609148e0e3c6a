"""The papers' figures and tables, measured again: one module per paper, one function per exhibit.

`registry` knows the exhibits and runs them, `claims` holds what a paper says against what was measured,
`command` is `fisherviz papers`. Nothing is imported here, so that the command line starts quickly.
"""
