"""Where the data sets come from: finding and fetching files, reading images and tables, drawing CURVES.

Private: `fisherviz.datasets` turns what these modules read into tensors. A new source is one function here
that returns a `Raw`, and one entry in the table of `fisherviz.datasets`.
"""
