"""Accuracies that the study published: "Pushing the limits of the compressive memory introduced in Infini-attention"
(TU Delft 2024), a GPT-Neo to which the memory was added by fine-tuning, one seed. GPT_NEO is a plain GPT-Neo from a
sibling study.
"""

STEPS = (0, 4000, 6000, 8300)  # of fine-tuning
# Segment length -> accuracy at each of the steps.
BLIMP = {
    32: (0.525, 0.567, 0.568, 0.572),
    64: (0.530, 0.565, 0.576, 0.558),
    128: (0.521, 0.558, 0.569, 0.574),
    256: (0.483, 0.559, 0.561, 0.566),
}
SUPERGLUE = {
    32: (0.477, 0.464, 0.483, 0.476),
    64: (0.444, 0.477, 0.470, 0.477),
    128: (0.491, 0.524, 0.522, 0.528),
    256: (0.509, 0.543, 0.544, 0.549),
}
GPT_NEO = {"blimp": 0.589, "glue": 0.503}
ACCURACIES = {"blimp": BLIMP, "glue": SUPERGLUE}
