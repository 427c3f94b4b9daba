"""Where scenes come from: rendered ones, published sets, your own captures.

synth.py      synthetic scenes, ray-cast
datasets.py   CO3D, RealEstate10K, ACID, COLMAP folders, nerfstudio
colmap.py     COLMAP models
resample.py   photos and depths of any camera to one pinhole camera a scene
"""
