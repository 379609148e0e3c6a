"""One file for each subcommand of `fisherviz`; heavy imports wait until a command runs."""
