"""The command line: the only package that prints. Reaches a server over HTTP alone, through `tunesmith.client`.

`main.py` and the two parser files import the standard library only, so that help is there at once; what a command
needs is loaded when it runs.
"""
