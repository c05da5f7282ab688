"""MoEfication: the neurons of a trained FFN in groups of equal size (arXiv 2110.01786, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from tnmoe.errors import DeclarationError

ROUNDS = 20
"""Of the balanced clustering."""


def split_ffn(
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    groups: int,
    assignment: Tensor | None = None,
) -> dict[str, Tensor]:
    """State of a `MoEfied` module, but for its router, from GELU(x · up_weight + up_bias) · down_weight + down_bias.

    Args:
        up_weight, up_bias, down_weight, down_bias: of shapes (I, H), (H), (H, O) and (O).
        groups: number of groups; divides H.
        assignment: the group of each neuron, as many of each; by default neurons with similar input weights share one.

    Raises:
        DeclarationError: groups that are not of one size.
    """
    hidden = up_weight.shape[1]
    if hidden % groups:
        raise DeclarationError(f"groups = {groups} must divide the {hidden} neurons")
    given = balanced_clusters(up_weight.T, groups) if assignment is None else assignment
    if torch.bincount(given, minlength=groups).tolist() != [hidden // groups] * groups:
        raise DeclarationError(f"assignment must give each of the {groups} groups {hidden // groups} neurons")
    order = torch.argsort(given, stable=True).view(groups, -1)
    return {
        "up_weight": up_weight.T[order].mT.contiguous(),
        "up_bias": up_bias[order],
        "down_weight": down_weight[order],
        "output_bias": down_bias.clone(),
    }


def balanced_clusters(points: Tensor, groups: int) -> Tensor:
    """k-means in which every cluster has as many points: the closest pairs of point and centre are joined first."""
    size = len(points) // groups
    centres = points[:: max(1, size)][:groups].clone()
    clusters = torch.zeros(len(points), dtype=torch.long)
    for _ in range(ROUNDS):
        free, chosen = [size] * groups, [-1] * len(points)
        for pair in torch.cdist(points, centres).flatten().argsort(stable=True).tolist():
            point, group = divmod(pair, groups)
            if chosen[point] < 0 and free[group]:
                chosen[point], free[group] = group, free[group] - 1
        new = torch.tensor(chosen)
        if torch.equal(new, clusters):
            break
        clusters = new
        centres = torch.stack([points[clusters == g].mean(0) for g in range(groups)])
    return clusters
