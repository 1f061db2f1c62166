"""What a config's fields ask of each other, group by group; `config.validate` has each by itself.

Fields are {dotted field: value}; `usual` has the defaults.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from flux_func.errors import UserError

Fields = Mapping[str, Any]


def check_groups(fields: Fields, usual: Fields) -> None:
    """Checks fields, each by itself found good; UserError for the first that does not go with others."""
    _check_text(fields)
    _check_lora(fields, usual)
    _check_remat(fields)
    _check_numerics(fields, usual)


def check_model(fields: Fields, usual: Fields) -> None:
    """Checks what a run starts from."""
    from flux_func.models.flux import FLAVORS

    flavor, weights, eps = fields["model.flavor"], fields["model.weights"], fields["model.qk_norm_eps"]
    needed = "should name what to start from, as model.flavor is '', which is the shape of that"
    check(fields, "model.weights", flavor or weights, needed)
    check(fields, "model.flavor", flavor in ("", *FLAVORS), one_of(flavor, FLAVORS))
    scheme = fields["model.init"] == usual["model.init"]
    check(fields, "model.init", scheme or not weights, f"is read only where model.weights is '', it is {weights!r}")
    check(fields, "model.qk_norm_eps", eps is None or eps > 0, "should be above 0, such as 1e-6")


def _check_text(fields: Fields) -> None:
    path, own = fields["text.path"], fields["text.t5"] and fields["text.clip"]
    needed = "should be set, as text.kind is 'hf' (or both of text.t5 and text.clip)"
    check(fields, "text.path", fields["text.kind"] != "hf" or path or own, needed)
    check(fields, "text.path", not (path and own), "is not read where both of text.t5 and text.clip are set")


def _check_lora(fields: Fields, usual: Fields) -> None:
    rank = fields["lora.rank"]
    for field in ("lora.alpha", "lora.patterns", "parallel.lora"):
        as_usual = json.dumps(fields[field]) == json.dumps(usual[field])  # a tuple in one is a list in the other
        check(fields, field, rank or as_usual, "is read only where lora.rank is above 0")
    something = fields["model.weights"] or fields["model.init"] != usual["model.init"]
    remedy = "needs model.weights to adapt: before pre-training the last layer is zero, and a LoRA would learn nothing"
    check(fields, "lora.rank", something or not rank, remedy)
    patterns = fields["lora.patterns"]
    texts = patterns and all(isinstance(pattern, str) for pattern in patterns)
    check(fields, "lora.patterns", texts, "should be patterns of linears, such as 'double_blocks.*'")
    remedy = f"is not read where lora.rank is {rank}: a LoRA's moments are where parallel.lora has it"
    check(fields, "parallel.moments", not (rank and fields["parallel.moments"]), remedy)


def _check_remat(fields: Fields) -> None:
    keep, policy, rank = fields["remat.keep"], fields["remat.policy"], fields["lora.rank"]
    texts = keep and all(isinstance(pattern, str) for pattern in keep)
    remedy = "should be 'attention', and patterns of linears such as 'single_blocks.linear2'; or remat.policy 'full'"
    check(fields, "remat.keep", texts, remedy)
    usual = list(keep) == ["attention"]
    check(fields, "remat.keep", usual or policy == "selective", "is read only where remat.policy is 'selective'")
    remedy = f"of linears nothing is kept where lora.rank is {rank}; leave it at ('attention',)"
    check(fields, "remat.keep", usual or not rank, remedy)


def _check_numerics(fields: Fields, usual: Fields) -> None:
    linear, patterns = fields["numerics.linear"], fields["numerics.patterns"]
    texts = patterns and all(isinstance(pattern, str) for pattern in patterns)
    check(fields, "numerics.patterns", texts, "should be patterns of linears, such as 'single_blocks.linear1'")
    good = linear or list(patterns) == usual["numerics.patterns"]
    check(fields, "numerics.patterns", good, "is read only where numerics.linear is not ''")
    good = not linear or list(fields["remat.keep"]) == ["attention"]
    check(fields, "remat.keep", good, f"of linears nothing is kept where numerics.linear is {linear!r}")
    narrow = "bfloat16" in (fields["numerics.param"], fields["optimizer.moments"])
    good = narrow or fields["numerics.rounding"] == usual["numerics.rounding"]
    check(fields, "numerics.rounding", good, "is read only where numerics.param or optimizer.moments is 'bfloat16'")


# Words.


def check(fields: Mapping[str, Any], field: str, good: Any, remedy: str) -> None:
    """Raises UserError that names one of {dotted field: value}, its value and the remedy, unless it is good."""
    if not good:
        raise UserError(f"{field} is {fields[field]!r}: {remedy}")


def nearest(value: str, choices: Iterable[str]) -> str:
    """Returns "did you mean ...? " for the choice nearest to a value, or "" where none is near."""
    import difflib

    near = difflib.get_close_matches(value, list(choices), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def one_of(value: Any, choices) -> str:
    """Returns the remedy for a value that is none of `choices`: the nearest one, and all of them."""
    listed = ", ".join(repr(choice) for choice in choices)
    return f"{nearest(str(value), map(str, choices))}should be one of {listed}"
