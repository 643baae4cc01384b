"""What is data: pictures of folders, archives and tables, read by one reader, and their latents."""

from __future__ import annotations


def __getattr__(name: str) -> object:
    """`load_images`, the door to this room, without the path of its module."""
    if name != "load_images":
        raise AttributeError(f"module 'halfstep.data' has no attribute {name!r}")
    from halfstep.data.images import load_images

    return load_images
