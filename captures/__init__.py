"""Where shards come from.

synth.py      synthetic scenes of solids.py, rendered with exact cameras and depth
datasets.py   CO3D, RealEstate10K and ACID as they are published
own.py        COLMAP models with their images, folders with a transforms.json
photos.py     photos and videos, whose cameras structure from motion finds
resample.py   photos of any camera made those of one pinhole camera
writer.py     raw scenes as members of tars
make.py       shards of captures, in several processes
encode.py     raw shards to encoded ones
"""
