"""Zero-shot stitching: an encoder of one network before the head of another, with nothing trained."""

from __future__ import annotations

from torch import Tensor, nn

from rba_compress.core.errors import SpaceError
from rba_compress.core.inference import evaluating
from rba_compress.core.map_spec import MapSpec
from rba_compress.latent.anchors import Anchors
from rba_compress.latent.relative import InvarianceProduct, RelativeProjection
from rba_compress.linalg.maps import fit_map
from rba_compress.linalg.moments import PairMoments
from rba_compress.linalg.similarity import Invariant

BETWEEN = ("linear", "affine", "orthogonal")
"""Kinds of maps between spaces of any widths; an orthogonal one is so as far as widths allow."""


class Stitched(nn.Module):
    """Network of `encoder`, the bridge between the spaces, and `head`, in sequence."""

    def __init__(self, encoder: nn.Module, bridge: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.bridge, self.head = encoder, bridge, head

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.head(self.bridge(self.encoder(x)))
        return read


def stitch(
    encoder: nn.Module,
    head: nn.Module,
    encoder_anchors: Anchors,
    head_anchors: Anchors,
    bridge: Invariant | InvarianceProduct | MapSpec = "cosine",
    *,
    classes: int | None = None,
) -> Stitched:
    """Put an encoder before a head that was trained on another space.

    Args:
        encoder: maps its inputs to (N, d).
        head: reads the output of `bridge` on the head's own space: K similarities, the product's
            output, or for a map the space itself.
        encoder_anchors, head_anchors: the same samples in both spaces, (K, d) and (K, d').
        bridge: an invariance that the head was trained on; or the product, with the weights that were
            trained with the head (the weights are shared, not copied); or a map, fitted in closed form
            from the anchors of the one space to those of the other.
        classes: number of classes of the head; fewer anchors are refused.

    Returns:
        The network, in eval mode where both were; the parts are the caller's own.

    Raises:
        SpaceError: the anchors are not parallel, or on two devices; too few; the map is of a kind that
            does not lead from one space to another; the head does not take the output of the bridge.
    """
    encoder_anchors.require_parallel(head_anchors)
    source, target = encoder_anchors.vectors, head_anchors.vectors
    if source.device != target.device:
        raise SpaceError(
            f"anchors on {source.device} and on {target.device}: move both spaces to one device"
        )
    if classes is not None and len(source) < classes:
        raise SpaceError(
            f"{len(source)} anchors for {classes} classes: take one of each class at least"
        )
    joint = bridge_between(encoder_anchors, head_anchors, bridge)
    stitched = Stitched(encoder, joint, head)
    stitched.training = joint.training = encoder.training or head.training
    try:
        with evaluating(stitched):
            head(joint(source[:2]))
    except RuntimeError as error:
        raise SpaceError(
            f"the head does not take the {len(source)} anchors' space: {error}. Pass the bridge that "
            "it was trained on"
        ) from error
    return stitched


def bridge_between(
    source: Anchors, target: Anchors, bridge: Invariant | InvarianceProduct | MapSpec
) -> nn.Module:
    """Return the module from the space of `source` to the input of a head on the space of `target`."""
    if isinstance(bridge, InvarianceProduct):
        return bridge.bind(source)
    if isinstance(bridge, str):
        return RelativeProjection(source, bridge)
    if bridge.kind not in BETWEEN:
        raise SpaceError(
            f"a map of kind {bridge.kind!r} does not lead from one space to another: choose one of "
            f"{', '.join(BETWEEN)}"
        )
    fit = fit_map(bridge, PairMoments.from_rows(source.vectors, target.vectors))
    widths = source.vectors.shape[1], target.vectors.shape[1]
    # Initial weights would be drawn from the global random state.
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, *widths, bias="bias" in fit.tensors).to(
        source.vectors
    )
    layer.load_state_dict(fit.tensors)
    return layer.requires_grad_(False)
