"""Closed forms from second moments.

moments     mergeable second moments
maps        a fitted map and its module
narrowing   fewer inputs of a linear layer
similarity  similarity of streams and of spaces
sketch      random projection that keeps inner products
"""
