"""The command line's parts that are more than a few lines: ``evaluate`` and the ``files`` it reads, ``demo``.

``cli`` parses the arguments and calls them. The public functions may be imported here, and no other room's insides but
``_runtime``.
"""
