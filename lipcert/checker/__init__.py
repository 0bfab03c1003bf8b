"""Re-prove a certificate from its files alone, with NumPy and safetensors; docs/certificate.md is the format.

    python -m checker certificate.json [--images images.safetensors]

This folder imports nothing of lipcert and shares no method with it, so that an error there is not repeated here. It can
be copied and run alone. Each file imports only files before it, in this order of reading:

    reading      files that may be hostile
    rounding     the arithmetic that everything rests on
    maps         the forms in which a linear function of a value is held
    norms        what is proved of them, by Cholesky factorisations
    operators    what they compute, their constants, what rounding adds
    resampling   those that change the number of positions
    attention    on rows that are normalised
    program      the list of operators, and the maps between its values
    steps        the proof
    evaluation   the forward pass, and how far it is from the exact one
    rows         radii, and counts of positions
    certificate  all of it: `check`

A bound rests on maps, norms, operators, resampling, attention and steps: some 750 lines of code, and 170 that say why.
The rest reads files, evaluates images, and compares.

Everything that is accepted has been confirmed by a number of the checker's own. Whatever cannot be confirmed ends in
`Rejected`, with one sentence that says what and where: a claim that is false, and one that this checker cannot judge.
"""

from .certificate import Report, check
from .reading import Rejected

__all__ = ["Rejected", "Report", "check"]
