"""An embedded survey: eight everyday questions, two to four one-word answers each, and made-up population shares.

It is small enough to train a real chat model on in minutes and has a known optimum: with soft labels
p_ij = s_i / (s_i + s_j) the reward is log s, so SPL's closed form can be written down and compared.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Question(NamedTuple):
    """A question, its answers, and the share of the population that gives each."""

    text: str
    shares: dict[str, float]


SURVEY = (
    Question("Coffee or tea in the morning?", {"Coffee": 0.8, "Tea": 0.2}),
    Question("Is a hot dog a sandwich?", {"No": 0.6, "Yes": 0.4}),
    Question("Which season do you like best?", {"Summer": 0.4, "Spring": 0.3, "Autumn": 0.2, "Winter": 0.1}),
    Question("Cats or dogs?", {"Dogs": 0.55, "Cats": 0.45}),
    Question("Which meal matters most?", {"Breakfast": 0.5, "Dinner": 0.35, "Lunch": 0.15}),
    Question("Mountains or beach for a holiday?", {"Beach": 0.7, "Mountains": 0.3}),
    Question("How do you get to work?", {"Car": 0.5, "Train": 0.2, "Bus": 0.2, "Bike": 0.1}),
    Question("Which fruit would you pick?", {"Apple": 0.45, "Banana": 0.3, "Orange": 0.25}),
)


def prompt(question: Question) -> str:
    """The question as it is put to the model."""
    return f"{question.text} Answer with one word."


def survey_rows() -> Iterator[dict[str, Any]]:
    """The survey as preference rows: one a question, all pairwise comparisons, soft labels from the shares."""
    for question in SURVEY:
        yield {"prompt": prompt(question), "responses": list(question.shares), "shares": list(question.shares.values())}
