"""The maths data sets users know by name: where each lies on the Hugging Face hub and what its columns mean.

A row here knows config, splits and form of a set. Any other hub id works too, as far as its splits have usual
names.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

# What is asked of the model, appended to the question. `boxed` and `hash` are the forms that the rewards
# read.
INSTRUCTIONS = {
    "boxed": "Reason step by step and put the final answer within \\boxed{}.",
    "hash": "Reason step by step and put the final answer after ####.",
}


@dataclass(frozen=True)
class Source:
    """A data set on the hub.

    `train` and `held_out` are split names as `datasets.load_dataset` takes them (`train+test` joins two);
    None: the set has none. `held_out_from` takes the held-out problems from another row of the registry
    instead, and removes them from `train`. `configs` are loaded one after another and joined. `form` is how
    its worked solutions state the answer (`INSTRUCTIONS`). `keep` are values that other columns must have for
    a row to be used. `unique` leaves out repeated questions. The columns themselves are found by name
    (`columns.py`).
    """

    hub_id: str
    alias: str
    train: str | None
    held_out: str | None
    configs: tuple[str | None, ...] = (None,)
    form: str = "boxed"
    held_out_from: str | None = None
    keep: tuple[tuple[str, str], ...] = ()
    unique: bool = False


_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

SOURCES: tuple[Source, ...] = (
    # Training sets, most with a split for evaluation.
    Source("openai/gsm8k", "gsm8k", "train", "test", configs=("main",), form="hash"),
    # 12,000 problems: all of MATH less MATH-500, which is the evaluation set.
    Source(
        "EleutherAI/hendrycks_math",
        "hendrycks_math",
        "train+test",
        None,
        configs=_MATH_SUBJECTS,
        held_out_from="HuggingFaceH4/MATH-500",
    ),
    Source("DigitalLearningGmbH/MATH-lighteval", "math", "train", "test"),
    Source("hiyouga/math12k", "math12k", "train", "test"),
    # The hub file repeats its 17 thousand problems about a hundred times.
    Source("BytedTsinghua-SIA/DAPO-Math-17k", "dapo_math_17k", "train", None, unique=True),
    Source("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler", "train", None),
    # Proofs and problems without a found answer hold the words `proof` and `notfound`; see
    # `columns.NO_ANSWER`.
    Source(
        "AI-MO/NuminaMath-1.5",
        "numinamath_1.5",
        "train",
        None,
        keep=(("problem_is_valid", "Yes"), ("solution_is_valid", "Yes")),
    ),
    Source("open-r1/OpenR1-Math-220k", "openr1_math_220k", "train", None, configs=("default",)),
    Source("ChilleD/SVAMP", "svamp", "train", "test"),
    # Evaluation only. Some call their only split `train`.
    Source("HuggingFaceH4/MATH-500", "math500", None, "test"),
    Source("HuggingFaceH4/aime_2024", "aime2024", None, "train"),
    Source("AI-MO/aimo-validation-aime", "aimo_validation_aime", None, "train"),
    Source("math-ai/aime25", "aime2025", None, "test"),
    Source(
        "opencompass/AIME2025", "aime2025_opencompass", None, "test", configs=("AIME2025-I", "AIME2025-II")
    ),
    Source("math-ai/amc23", "amc23", None, "test"),
    Source(
        "Hothan/OlympiadBench",
        "olympiadbench",
        None,
        "train",
        configs=("OE_TO_maths_en_COMP",),
    ),
    Source("math-ai/minervamath", "minerva_math", None, "test"),
    Source("RUC-AIBOX/OlymMATH", "olymmath_en_easy", None, "test", configs=("en-easy",)),
    Source("RUC-AIBOX/OlymMATH", "olymmath_en_hard", None, "test", configs=("en-hard",)),
    Source("BytedTsinghua-SIA/AIME-2024", "aime2024_dapo", None, "train", unique=True),
)

_BY_NAME = {source.hub_id.lower(): source for source in reversed(SOURCES)}  # of two rows, the first
_BY_NAME |= {source.alias.lower(): source for source in SOURCES}


def find_source(name: str) -> Source | None:
    """The data set called `name` (a hub id or the short name, in any case); None if not in the registry."""
    return _BY_NAME.get(name.lower())


def nearest_names(name: str) -> list[str]:
    """Up to two known names that look like `name`, for error messages."""
    return difflib.get_close_matches(name.lower(), _BY_NAME, n=2, cutoff=0.7)


def known_names() -> list[str]:
    """The short names."""
    return [source.alias for source in SOURCES]
