"""Memory of programs: what changed (tracker, shared), and how it gets to the other side (source, sink, stream).

All work on pages is native; Python passes lists of extents from one to the other.
"""
