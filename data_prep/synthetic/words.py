"""The words that examples consist of."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Filler and passkey are those of Mohtashami & Jaggi 2023 (arXiv:2305.16300), with punctuation as words. The filler
# repeats the same sentences: a model learns it in a few steps, and what is left to learn is to recall.
FILLER = _words("the grass is green . the sky is blue . the sun is yellow . here we go . there and back again .")
KEYS = _words(
    "Adam Alice Amy Andrew Anna Arthur Ben Betty Bill Bob Charles Chris Clara Daisy Dan David Dora Edward Ella Emily "
    "Emma Eric Frank Fred George Grace Harry Helen Henry Ivan Jack James Jane Jim Joe John Julia Kate Kevin Laura Leo "
    "Lily Lisa Lucy Luke Maria Mark Martin Mary Max Mike Nancy Nick Oliver Oscar Paul Peter Rose Ruth Sam Sarah Susan "
    "Tim Tom"
)
VALUES = _words(
    "apple ball bear bed bell bird boat book bottle box bread bridge brush bus cake candle car cat chair clock cloud "
    "coat coin cow cup desk dog door dress duck egg fish flag flower fork fox garden hat horse house kite knife lamp "
    "leaf letter map milk moon mouse paper pen picture rabbit ring river rope ship shoe spoon star stone table tree "
    "window"
)
DIGITS = _words("0 1 2 3 4 5 6 7 8 9")
TASK_WORDS = _words("? = ; answer key pass remember it what")  # of questions and facts
VOCABULARY = tuple(dict.fromkeys(FILLER + TASK_WORDS + DIGITS + KEYS + VALUES))  # all, in a fixed order
