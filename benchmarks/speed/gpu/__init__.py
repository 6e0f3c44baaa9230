"""The run-book of one GPU: stages in order of value, each a process with a limit; see __main__.py."""
