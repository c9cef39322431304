"""
What surrounds the trainer: dev/run is part of the program, the rest is for developers and users' tools.

It is a package so that no other `dev` on the path is taken for it. Every script in it runs in two ways, under one name:

    python -m dev.data.text    in the project's folder
    python dev/data/text.py    from anywhere

The second puts the script's own folder on the path, where text.py or pydoc.py would hide modules of Python's. So every
script begins by putting the project's folder in its place.
"""
