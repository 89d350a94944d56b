"""The words people write for the enums of the wire, and back: `"grad-cam"` for `METHOD_GRAD_CAM`.

Specs and the command line turn words into enum names here; results and cards turn numbers into words. Case, hyphens,
underscores and spaces do not matter on the way in, and a wrong word is answered with the nearest right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from camserve.v1 import explanation_service_pb2, heatmap_pb2, input_pb2, model_service_pb2, spec_pb2

# Written out where people know a name that the enum's own would not give.
_METHOD_SLUGS: Final = {
    "METHOD_HIRES_CAM": "hirescam",
    "METHOD_LAYER_CAM": "layercam",
    "METHOD_GRAD_CAM_PLUS_PLUS": "grad-cam++",
    "METHOD_SMOOTH_GRAD_CAM_PLUS_PLUS": "smooth-grad-cam++",
    "METHOD_FULL_GRAD": "fullgrad",
    "METHOD_SMOOTH_GRAD": "smoothgrad",
    "METHOD_LE_GRAD": "legrad",
}


class Vocabulary:
    """The words of one enum.

    Attributes:
        noun: what the words name, for messages.
        words: every word as it is written out, in order of the enum.
    """

    def __init__(
        self, noun: str, prefix: str, numbers: Mapping[str, int], slugs: Mapping[str, str] | None = None
    ) -> None:
        self.noun = noun
        self._by_number: dict[int, str] = {}
        self._by_key: dict[str, str] = {}
        self._by_name: dict[str, str] = {}
        for name, number in numbers.items():
            if number == 0:  # UNSPECIFIED is the absence of a word.
                continue
            word = (slugs or {}).get(name, name.removeprefix(prefix).lower().replace("_", "-"))
            self._by_number[number] = self._by_name[name] = word
            self._by_key[_key(word)] = name
            self._by_key.setdefault(_key(name.removeprefix(prefix)), name)
        self.words = tuple(self._by_number.values())

    def name(self, word: str) -> str:
        """Returns the enum's name for a word, such as "METHOD_CAM"; raises ValueError listing the words there are."""
        try:
            return self._by_key[_key(word)]
        except (KeyError, AttributeError):
            raise ValueError(self._refusal(word)) from None

    def word(self, number: int) -> str:
        """Returns the word of an enum number: empty for zero, and such as "method-99" for one newer than this client."""
        if number == 0:
            return ""
        return self._by_number.get(number, f"{self.noun}-{number}")

    def _refusal(self, word: object) -> str:
        near = difflib.get_close_matches(_key(word), self._by_key, n=1) if isinstance(word, str) else []
        hint = f"; did you mean {self._by_name[self._by_key[near[0]]]!r}?" if near else "."
        return f"unknown {self.noun} {word!r}{hint} Known: {', '.join(self.words)}"


def _key(word: str) -> str:
    """Folds what does not matter: case, separators, and "++" for "plusplus"."""
    return word.lower().translate(_SEPARATORS)


_SEPARATORS: Final = str.maketrans({"-": "", "_": "", " ": "", "+": "plus"})

METHODS: Final = Vocabulary("method", "METHOD_", dict(spec_pb2.Method.items()), MappingProxyType(_METHOD_SLUGS))
SCORES: Final = Vocabulary("score", "SCORE_", dict(spec_pb2.Score.items()))
POLARITIES: Final = Vocabulary("polarity", "POLARITY_", dict(spec_pb2.Polarity.items()))
PROFILES: Final = Vocabulary("profile", "PROFILE_", dict(spec_pb2.Profile.items()))
FUSIONS: Final = Vocabulary("fusion", "FUSION_", dict(spec_pb2.Fusion.items()), {"FUSION_LAYER_CAM": "layercam"})
SIZES: Final = Vocabulary("size", "MAP_SIZE_", dict(spec_pb2.MapSize.items()))
ENCODINGS: Final = Vocabulary("encoding", "ENCODING_", dict(spec_pb2.Encoding.items()))
NORMALISATIONS: Final = Vocabulary("normalisation", "NORMALISATION_", dict(spec_pb2.Normalisation.items()))
SALIENCIES: Final = Vocabulary("saliency", "SALIENCY_", dict(spec_pb2.Saliency.items()))
LANES: Final = Vocabulary("lane", "LANE_", dict(explanation_service_pb2.Lane.items()))
FLAGS: Final = Vocabulary("flag", "MAP_FLAG_", dict(heatmap_pb2.MapFlag.items()))
RULE_OUTCOMES: Final = Vocabulary("rule-outcome", "RULE_OUTCOME_", dict(heatmap_pb2.RuleOutcome.items()))
DATA_TYPES: Final = Vocabulary("data-type", "DATA_TYPE_", dict(input_pb2.DataType.items()))
MODEL_STATES: Final = Vocabulary("state", "MODEL_STATE_", dict(model_service_pb2.ModelState.items()))
OUTPUT_KINDS: Final = Vocabulary("output-kind", "OUTPUT_KIND_", dict(model_service_pb2.OutputKind.items()))
PROGRAM_KINDS: Final = Vocabulary("program-kind", "PROGRAM_KIND_", dict(model_service_pb2.ProgramKind.items()))
LAYOUTS: Final = Vocabulary("layout", "LAYER_LAYOUT_", dict(model_service_pb2.LayerLayout.items()))
