"""Similarity of latent spaces between networks; the rest of this package uses similarity within one.

Two networks that were trained apart rarely agree on coordinates, and often on distances: a space that
is described by each sample's similarity to the same anchors can be read by a head of another network.
"""

from rba_compress.latent.aggregation import Aggregate, aggregate, class_separability
from rba_compress.latent.anchors import Anchors, farthest_points, k_means, random_points
from rba_compress.latent.bootstrapping import (
    Bootstrapped,
    Retrieval,
    bootstrap_anchors,
    retrieval,
    sinkhorn,
)
from rba_compress.latent.relative import InvarianceProduct, RelativeProjection
from rba_compress.latent.stitching import Stitched, stitch
from rba_compress.linalg.similarity import Invariant, relative_similarity

__all__ = [
    "Aggregate",
    "Anchors",
    "Bootstrapped",
    "InvarianceProduct",
    "Invariant",
    "RelativeProjection",
    "Retrieval",
    "Stitched",
    "aggregate",
    "bootstrap_anchors",
    "class_separability",
    "farthest_points",
    "k_means",
    "random_points",
    "relative_similarity",
    "retrieval",
    "sinkhorn",
    "stitch",
]
