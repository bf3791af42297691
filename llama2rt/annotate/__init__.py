"""Who says which of two answers is better: people's files, models, or a function of one's own."""

from llama2rt.annotate.options import AnnotatorOptions
from llama2rt.annotate.pairs import Annotator, AnswerPair, Judgement

__all__ = ["Annotator", "AnnotatorOptions", "AnswerPair", "Judgement"]
