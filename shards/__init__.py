"""Data at rest: where shards lie, what is in them, how they are written.

files.py      files, web addresses and commands, read by offset
tar.py        the members of an archive
index.py      what is known of a shard: members and cameras
scenes.py     the scenes of a source: images, depths, latents
inspector.py  shards summed up, drawn and verified
writer.py     raw scenes written
encode.py     raw shards to encoded ones
"""
