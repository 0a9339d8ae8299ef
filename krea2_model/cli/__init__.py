"""The command line, `krea2` or `python -m krea2_model`.

`parser` has the commands and their options; each command is a module of its own, imported when it
runs. Help and version need neither torch nor the model.
"""
