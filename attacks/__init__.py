"""The other side of a certificate: attacks on it, and pairs of inputs that bound a Lipschitz constant from below."""

if __name__ != "lipcert.attacks":
    raise ImportError(
        f"this package is lipcert.attacks; it was imported as {__name__!r}. Write `import lipcert.attacks`: "
        "under two names there would be two copies"
    )

from lipcert.attacks.ascent import LowerBound, lipschitz_lower
from lipcert.attacks.autoattack import Attacked, Ensemble, autoattack
from lipcert.attacks.segmentation import SceneAttacked, SceneEnsemble, attack_scenes, worst_accuracy, worst_miou

__all__ = [
    "Attacked",
    "Ensemble",
    "LowerBound",
    "SceneAttacked",
    "SceneEnsemble",
    "attack_scenes",
    "autoattack",
    "lipschitz_lower",
    "worst_accuracy",
    "worst_miou",
]
