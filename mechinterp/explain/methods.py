"""All explainers of elements by name, what each is built from, and which questions each can answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mechinterp.explain import anchors, attention, cam, coalitions, gradients
from mechinterp.explain.question import ElementExplainer, Kind, Question
from mechinterp.models import HookedVLM

__all__ = ["ELEMENT_METHODS", "BuiltFrom", "Method", "applies"]

BuiltFrom = Literal["gradient", "single_fill", "subset_fill", "attention", "activation", "latent", "graph", "none"]
ANY: frozenset[Kind] = frozenset({"column", "patch", "word"})
READ: frozenset[Kind] = frozenset({"patch", "word"})  # what a vision-language model reads


@dataclass(frozen=True)
class Method:
    """An explainer and what a fair comparison must know of it.

    Args:
        name: as users write it.
        explain: the explainer.
        built_from: what the attribution is made of; a metric made of the same thing must not judge it.
        kinds: elements that it can explain.
        anchor: no explanation, but a fixed point of a scale.
        stochastic: whether two generators give two answers.
        needs: what of a question it reads beside its function: nothing, the model, or the model or inner features.
        explains: of a method that reads a model with features of that model: whether there are such for it.
    """

    name: str
    explain: ElementExplainer
    built_from: BuiltFrom
    kinds: frozenset[Kind] = ANY
    anchor: bool = False
    stochastic: bool = False
    needs: Literal["nothing", "model", "features"] = "nothing"
    explains: Callable[[HookedVLM], bool] | None = None


def applies(method: Method, question: Question) -> bool:
    """Whether the method can answer the question: its kinds of elements, and the model where it reads one.

    For a method with features of its own this may look for those of the question's model, or train them.
    """
    kinds = set(question.kinds) - {"still"}
    if not kinds <= method.kinds or (method.explain is anchors.centre and question.shape is None):
        return False
    match method.needs:
        case "nothing":
            return True
        case "model":
            source = question.source
            return source is not None and (method.explains is None or method.explains(source.model))
        case "features":
            return question.source is not None or question.inner is not None


_ALL = (
    Method("lime", coalitions.lime, "subset_fill", stochastic=True),
    Method("kernel_shap", coalitions.kernel_shap, "subset_fill", stochastic=True),
    Method("gradient_shap", gradients.gradient_shap, "gradient", stochastic=True),
    Method("integrated_gradients", gradients.integrated_gradients, "gradient"),
    Method("occlusion", coalitions.occlusion, "single_fill"),
    Method("gradient_times_input", gradients.gradient_times_input, "gradient"),
    Method("grad_cam", cam.grad_cam, "gradient", needs="features"),
    Method("grad_cam_plus_plus", cam.grad_cam_plus_plus, "gradient", needs="features"),
    Method("attention_rollout", attention.attention_rollout, "attention", READ, needs="model"),
    Method("attention_flow", attention.attention_flow, "attention", READ, needs="model"),
    Method("transmm", attention.transmm, "attention", READ, needs="model"),
    Method("rise", coalitions.rise, "subset_fill", stochastic=True),
    Method("random", anchors.random, "none", anchor=True, stochastic=True),
    Method("constant", anchors.constant, "none", anchor=True),
    Method("centre", anchors.centre, "none", frozenset({"patch"}), anchor=True),
    Method("edges", anchors.edges, "none", anchor=True),
    Method("echo", anchors.echo, "none", anchor=True),
    Method("oracle", anchors.oracle, "single_fill", anchor=True),
)
ELEMENT_METHODS: dict[str, Method] = {method.name: method for method in _ALL}
