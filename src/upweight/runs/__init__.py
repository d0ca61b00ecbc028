"""Work that outlives its process: finished chunks on the disk, and whether a folder holds the same work.

`Store` is the noun, a folder of whole chunks and a manifest; `identity` is what a function does, as a digest.
"""
