"""Data at rest: where shards lie and what is in them.

files.py      files and web addresses, read by offset
streams.py    from patterns to files; copies of what commands and standard input give
tar.py        the members of an archive
index.py      the index of a shard: members and cameras
scenes.py     the scenes of a source: images, depths, latents
"""
