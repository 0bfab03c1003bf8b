"""Margin losses behind one signature: `loss(logits, labels, pairwise, eps) -> scalar`.

`logits` (n, K); `labels` (n,) int64; `pairwise` (K, K), entry (i, j) a Lipschitz bound or estimate of the difference
of logits i and j, differentiable; `eps` the l2 radius to train for, in [0, 1]-pixel units. The margins are those of
the certificate: an image counts at `eps` when `z_y - z_j > eps * pairwise[y, j]` for every other class j.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lipcert.registry import losses


@losses.register()
def cross_entropy(logits: Tensor, labels: Tensor, pairwise: Tensor, eps: float) -> Tensor:
    """Plain cross-entropy: for networks without a Lipschitz estimate. Uses neither `pairwise` nor `eps`.

    Alone of the losses it also takes labels that are shares of classes, (n, K).
    """
    return F.cross_entropy(logits, labels)


@losses.register()
def tau_cross_entropy(
    logits: Tensor, labels: Tensor, pairwise: Tensor, eps: float, *, temperature: float = 0.25
) -> Tensor:
    """Cross-entropy with a temperature, CE(z / t) t (Béthune et al., NeurIPS 2022, arXiv 2104.05097): what is clean,
    and what is robust, is balanced by t alone.

    `temperature` is in units of the mean pairwise constant, so that it means the same for every network: 1/τ of the
    papers, whose networks are 1-Lipschitz. `eps` is not used.
    """
    scale = temperature * (pairwise.sum() / (pairwise != 0).sum().clamp_min(1)).clamp_min(1e-8)
    return scale.detach() * F.cross_entropy(logits / scale, labels)


@losses.register()
def emma(logits: Tensor, labels: Tensor, pairwise: Tensor, eps: float) -> Tensor:
    """EMMA, efficient margin maximisation (Hu et al., NeurIPS 2023, arXiv 2301.12549, section 4).

    Each rival logit is raised by just as much of its robust margin as is already earned (between 1 % and all of it),
    so that no class pair dominates; the share is not differentiated.
    """
    margins = eps * pairwise[labels]  # (n, K), 0 at the label
    rivals = logits - logits.gather(1, labels[:, None])  # (n, K), 0 at the label
    share = (-rivals / margins.clamp_min(1e-8)).clamp(0.01, 1.0).detach()
    return F.cross_entropy(rivals + share * margins, labels)


@losses.register()
def gloro(logits: Tensor, labels: Tensor, pairwise: Tensor, eps: float) -> Tensor:
    """GloRo cross-entropy (Leino, Wang, Fredrikson, ICML 2021, arXiv 2102.08452): a further class, "not certified".

    Its logit is the best rival of the *predicted* class inside the ball, so a correct but uncertified image is still
    a mistake.
    """
    return F.cross_entropy(_with_bottom(logits, pairwise, eps), labels)


@losses.register()
def trades(logits: Tensor, labels: Tensor, pairwise: Tensor, eps: float, *, weight: float = 1.5) -> Tensor:
    """GloRo's TRADES variant (Leino et al. 2021, after Zhang et al. 2019): clean cross-entropy plus `weight` times the
    divergence KL(softmax(logits) || softmax(logits with the "not certified" class))."""
    with_bottom = _with_bottom(logits, pairwise, eps)
    # The two distributions share their logits, so the divergence is the difference of the normalisers.
    divergence = with_bottom.logsumexp(1) - logits.logsumexp(1)
    return F.cross_entropy(logits, labels) + weight * divergence.mean()


@losses.register()
def offset_cross_entropy(
    logits: Tensor, labels: Tensor, pairwise: Tensor, eps: float, *, temperature: float = 0.25
) -> Tensor:
    """Offset cross-entropy (Prach and Lampert, ECCV 2022, arXiv 2208.03160), with the pairwise margin as offset.

    The paper subtracts one constant from the label's logit of a 1-Lipschitz network; here each rival is raised by
    its own `eps * pairwise`, which is that constant when all pairs are alike. `temperature` is in units of the mean
    pairwise constant.
    """
    scale = temperature * (pairwise.sum() / (pairwise != 0).sum().clamp_min(1)).detach().clamp_min(1e-8)
    return scale * F.cross_entropy((logits + eps * pairwise[labels]) / scale, labels)


def _with_bottom(logits: Tensor, pairwise: Tensor, eps: float) -> Tensor:
    """Append the "not certified" logit: the best rival of the prediction raised by its margin, (n, K) -> (n, K + 1)."""
    predicted = logits.argmax(1)
    raised = logits + eps * pairwise[predicted]
    rivals = raised.masked_fill(F.one_hot(predicted, logits.shape[1]).bool(), -torch.inf)
    return torch.cat([logits, rivals.amax(1, keepdim=True)], dim=1)
