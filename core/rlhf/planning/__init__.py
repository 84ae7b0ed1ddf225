"""The resource planner: what a plan takes, in bytes and seconds, before anything is loaded.

    config.json -> weights (`architecture`) -> what each component makes of them (`footprint`, declared in its entry)
                -> bytes by role and phase (`memory`), seconds by phase (`duration`)
                -> does it fit (`prediction`), and what would (`fit`)

Pure functions of a plan; imports no torch, loads no weights, knows no plugin's name. Bytes are bytes, GiB are 2^30 of
them; counts of tokens are of one device's share.
"""
