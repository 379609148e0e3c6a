"""The version of the package.

Read here by the build, by saved results and by the command line; nothing else lives here.
"""

__version__ = "0.1.0"
