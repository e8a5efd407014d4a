"""The catalogue file as routing reads it: the sections `models`, `policies` and `task_types`, checked as a whole.

    models:
      openai/gpt-4o-mini:
        provider: openai                # an entry of `providers`
        upstream_model: gpt-4o-mini     # its name there; the part after the first slash when absent
        context_window: 128000
        max_output_tokens: 16384
        capabilities: [chat, tools, streaming]
        fields: [seed, logit_bias]      # request fields that not every model knows
        aliases: [gpt-4o-mini]
        fallbacks: [anthropic/claude-haiku-4-5]
        regions: [eu]
    policies:
      default:
        weights: {cost: 0.4, latency: 0.35, load: 0.1, affinity: 0.15}
        order: scored                   # or `fixed`: the order of the chain
        unknown_price: deny             # or `allow`
        tenants: [acme]                 # only for these; absent: for all
        waive_fallbacks: "why two fallbacks are not wanted"
        task_types: {simple: [..], reasoning: [..], code: [..], vision: [..]}
    task_types:
      simple: {latency_target: 5s, attempt_timeout: 20s}

A chain has at least three models, so two fallbacks, or the policy says why not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from services.routing.classifier import TaskType
from services.runtime.config import ConfigError

CAPABILITIES: Final = frozenset(
    {"chat", "embeddings", "tools", "vision", "json_object", "json_schema", "streaming", "reasoning", "logprobs"}
)
FIELDS: Final = frozenset(
    {"seed", "top_k", "presence_penalty", "frequency_penalty", "logit_bias", "parallel_tool_calls", "dimension_count"}
)
WIRE_FIELDS: Final = frozenset(
    {"messages.name", "image.detail", "tools.strict", "response_format.description", "reasoning_effort"}
)
"""Fields that are every model's unless its provider's wire format has no place for them; a model doesn't list them.
`reasoning_effort` is meant where a tool must be called at the same time; else it is the capability `reasoning`."""
UNCARRIED: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "openai": frozenset[str](),
        "anthropic": frozenset(
            {
                "embeddings", "logprobs", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "dimension_count",
                "messages.name", "image.detail", "reasoning_effort",
            }
        ),
        "gemini": frozenset({"logprobs", "logit_bias", "parallel_tool_calls", "messages.name", "image.detail"}),
        "local": frozenset(
            {"embeddings", "dimension_count", "messages.name", "image.detail", "tools.strict", "response_format.description"}
        ),
        "echo": frozenset[str](),
    }
)  # fmt: skip
"""What the adapter of each kind of provider can't carry, capabilities and fields: no model of the kind has it, whatever it lists."""
SCORERS: Final = ("cost", "latency", "load", "affinity")
DEFAULT_POLICY: Final = "default"
MIN_FALLBACKS: Final = 2
MAX_CHAIN: Final = 16
MAX_MODELS: Final = 5000
_ID: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}/[A-Za-z0-9][A-Za-z0-9_.:/-]{0,190}")
_ALIAS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,253}")
_POLICY: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)")
_SECONDS: Final[Mapping[str, float]] = {"ms": 0.001, "s": 1.0, "m": 60.0}
_MODEL_KEYS: Final = frozenset(
    {
        "provider", "upstream_model", "display_name", "context_window", "max_output_tokens", "capabilities", "fields", "price", "aliases",
        "fallbacks", "regions", "note",
    }
)  # fmt: skip
_PRICE_KEYS: Final = frozenset({"input", "output", "cached_input", "reasoning", "cache_write", "image", "request", "from"})
_POLICY_KEYS: Final = frozenset({"weights", "order", "unknown_price", "tenants", "waive_fallbacks", "task_types", "note"})
_SECTIONS: Final = frozenset({"providers", "models", "policies", "task_types", "tokenizers", "prices"})


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the catalogue."""

    id: str
    provider: str
    upstream_model: str
    display_name: str
    context_window: int
    """Largest prompt and answer together, tokens."""
    max_output_tokens: int
    capabilities: tuple[str, ...]
    """As written, for people."""
    abilities: frozenset[str]
    """Capabilities and `field:<name>`: what needs are checked against."""
    aliases: tuple[str, ...]
    fallbacks: tuple[str, ...]
    regions: tuple[str, ...]
    is_fake: bool
    """Served by a provider that makes its answers up; ranked after every other model."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How to choose where the caller names no model."""

    name: str
    weights: Mapping[str, float]
    """By scorer; they sum to 1."""
    is_scored: bool
    """False: the chain's own order is the rank."""
    allows_unknown_price: bool
    tenants: frozenset[str]
    """Empty: every tenant's."""
    chains: Mapping[TaskType, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class TaskTimes:
    """What a task type promises and allows. Seconds."""

    latency_target: float
    attempt_timeout: float


@dataclass(frozen=True, slots=True)
class Catalogue:
    """A catalogue that was checked."""

    version: str
    """Of its content: the same file gives the same version in every process and after every start."""
    models: Mapping[str, Model]
    names: Mapping[str, str]
    """Catalogue id by id and alias."""
    policies: Mapping[str, Policy]
    times: Mapping[TaskType, TaskTimes]


def parse(content: object) -> Catalogue:
    """The catalogue of a file's content. Raises ConfigError with every problem."""
    if not isinstance(content, Mapping):
        raise ConfigError(["the catalogue must be a mapping of sections"])
    problems = [f"{name}: unknown section" for name in sorted(map(str, set(content) - _SECTIONS))]
    kinds = _kinds(content.get("providers"))
    models = _models(content.get("models"), kinds, problems)
    names = _names(models, problems)
    policies = _policies(content.get("policies"), models, problems)
    times = _times(content.get("task_types"), problems)
    if problems:
        raise ConfigError(problems)
    canonical = json.dumps(content, sort_keys=True, default=str).encode()
    return Catalogue(
        hashlib.sha256(canonical).hexdigest()[:12],
        MappingProxyType(models),
        MappingProxyType(names),
        MappingProxyType(policies),
        MappingProxyType(times),
    )


def _kinds(section: object) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and regions by provider. What else stands there is execution's to check."""
    if not isinstance(section, Mapping):
        return {}
    return {
        str(name): (str(entry.get("kind")), tuple(map(str, entry.get("regions") or ())))
        for name, entry in section.items()
        if isinstance(entry, Mapping)
    }


def _models(section: object, kinds: Mapping[str, tuple[str, tuple[str, ...]]], problems: list[str]) -> dict[str, Model]:
    if not isinstance(section, Mapping) or not section:
        problems.append("models: must be a mapping with at least one model")
        return {}
    if len(section) > MAX_MODELS:
        problems.append(f"models: must have at most {MAX_MODELS} entries, got {len(section)}")
        return {}
    models = {}
    for name, value in section.items():
        model = _model(str(name), value, kinds, problems)
        if model is not None:
            models[model.id] = model
    for model in models.values():
        for fallback in model.fallbacks:
            if fallback not in section:
                problems.append(f"models.{model.id}.fallbacks: {fallback!r} is not in the catalogue")
            elif fallback == model.id:
                problems.append(f"models.{model.id}.fallbacks: a model can't be its own fallback")
    return models


def _model(name: str, value: Any, kinds: Mapping[str, tuple[str, tuple[str, ...]]], problems: list[str]) -> Model | None:
    where = f"models.{name}"
    if not _ID.fullmatch(name) or name.startswith("policy/"):
        problems.append(f"{where}: the id must be `<provider>/<name>`, and `policy/` is kept for policies")
    if not isinstance(value, Mapping):
        problems.append(f"{where}: must be a mapping")
        return None
    problems += [f"{where}.{key}: unknown" for key in sorted(map(str, set(value) - _MODEL_KEYS))]
    provider = str(value.get("provider") or "")
    kind, regions = kinds.get(provider, ("", ()))
    if not kind:
        problems.append(f"{where}.provider: {provider!r} is not in `providers`")
    capabilities = _texts(value, "capabilities", where, problems)
    fields = _texts(value, "fields", where, problems)
    problems += [f"{where}.capabilities: {one!r} is not known" for one in capabilities if one not in CAPABILITIES]
    problems += [f"{where}.fields: {one!r} is not known" for one in fields if one not in FIELDS]
    uncarried = UNCARRIED.get(kind, frozenset())
    for key, listed in (("capabilities", capabilities), ("fields", fields)):
        problems += [f"{where}.{key}: a provider of kind {kind} can't carry {one!r}" for one in listed if one in uncarried]
    if not capabilities:
        problems.append(f"{where}.capabilities: must name at least one of {', '.join(sorted(CAPABILITIES))}")
    _check_price(value.get("price"), f"{where}.price", problems)
    fallbacks = _texts(value, "fallbacks", where, problems)
    if len(fallbacks) >= MAX_CHAIN:
        problems.append(f"{where}.fallbacks: must have fewer than {MAX_CHAIN} entries")
    return Model(
        id=name,
        provider=provider,
        upstream_model=str(value.get("upstream_model") or name.partition("/")[2]),
        display_name=str(value.get("display_name") or name),
        context_window=_count(value, "context_window", 1, where, problems),
        max_output_tokens=_count(value, "max_output_tokens", 0, where, problems),
        capabilities=capabilities,
        abilities=frozenset(capabilities) | {f"field:{field}" for field in (*fields, *(WIRE_FIELDS - uncarried))},
        aliases=_texts(value, "aliases", where, problems),
        fallbacks=fallbacks,
        regions=_texts(value, "regions", where, problems) or regions,
        is_fake=kind == "echo",
    )


def _check_price(price: object, where: str, problems: list[str]) -> None:
    """Its form alone, so that a file with a wrong one is refused as a whole; what it comes to is metering's."""
    if price is None or price == "free":
        return
    for entry in price if isinstance(price, list) else [price]:
        if not isinstance(entry, Mapping) or not {"input", "output"} <= set(entry) or set(entry) - _PRICE_KEYS:
            problems.append(
                f"{where}: must be `free`, or have input and output in dollars per million tokens, and maybe "
                f"{', '.join(sorted(_PRICE_KEYS - {'input', 'output'}))}; or be a list of such, each with `from`"
            )
            return


def _names(models: Mapping[str, Model], problems: list[str]) -> dict[str, str]:
    names = {name: name for name in models}
    for model in models.values():
        for alias in model.aliases:
            if not _ALIAS.fullmatch(alias) or alias == "auto" or alias.startswith("policy/"):
                problems.append(f"models.{model.id}.aliases: {alias!r} can't be an alias")
            elif alias in names:
                problems.append(f"models.{model.id}.aliases: {alias!r} already names {names[alias]}")
            else:
                names[alias] = model.id
    return names


def _policies(section: object, models: Mapping[str, Model], problems: list[str]) -> dict[str, Policy]:
    if not isinstance(section, Mapping) or DEFAULT_POLICY not in section:
        problems.append(f"policies: must be a mapping that has {DEFAULT_POLICY!r}")
        return {}
    policies = {}
    for name, value in section.items():
        policy = _policy(str(name), value, models, problems)
        if policy is not None:
            policies[policy.name] = policy
    if DEFAULT_POLICY in policies and policies[DEFAULT_POLICY].tenants:
        problems.append(f"policies.{DEFAULT_POLICY}.tenants: the default policy is everybody's")
    return policies


def _policy(name: str, value: Any, models: Mapping[str, Model], problems: list[str]) -> Policy | None:
    where = f"policies.{name}"
    if not _POLICY.fullmatch(name):
        problems.append(f"{where}: the name must match [a-z0-9][a-z0-9_-]*")
    if not isinstance(value, Mapping):
        problems.append(f"{where}: must be a mapping")
        return None
    problems += [f"{where}.{key}: unknown" for key in sorted(map(str, set(value) - _POLICY_KEYS))]
    order = value.get("order", "scored")
    if order not in ("scored", "fixed"):
        problems.append(f"{where}.order: must be scored or fixed, got {order!r}")
    unknown_price = value.get("unknown_price", "deny")
    if unknown_price not in ("deny", "allow"):
        problems.append(f"{where}.unknown_price: must be deny or allow, got {unknown_price!r}")
    waived = value.get("waive_fallbacks", "")
    if not isinstance(waived, str):
        problems.append(f"{where}.waive_fallbacks: must say why, in words")
    return Policy(
        name=name,
        weights=_weights(value.get("weights"), where, problems),
        is_scored=order == "scored",
        allows_unknown_price=unknown_price == "allow",
        tenants=frozenset(_texts(value, "tenants", where, problems)),
        chains=MappingProxyType(_chains(value.get("task_types"), models, bool(waived), where, problems)),
    )


def _weights(value: object, where: str, problems: list[str]) -> Mapping[str, float]:
    if value is None:
        return MappingProxyType(dict.fromkeys(SCORERS, 1 / len(SCORERS)))
    if not isinstance(value, Mapping):
        problems.append(f"{where}.weights: must be a mapping of {', '.join(SCORERS)}")
        return {}
    weights = dict.fromkeys(SCORERS, 0.0)
    for name, weight in value.items():
        if name not in weights:
            problems.append(f"{where}.weights.{name}: is not one of {', '.join(SCORERS)}")
        elif isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1000:
            problems.append(f"{where}.weights.{name}: must be a number from 0 to 1000, got {weight!r}")
        else:
            weights[name] = float(weight)
    total = sum(weights.values())
    if total <= 0:
        problems.append(f"{where}.weights: at least one must be above 0")
        return weights
    return MappingProxyType({name: weight / total for name, weight in weights.items()})


def _chains(
    section: object, models: Mapping[str, Model], waived: bool, where: str, problems: list[str]
) -> dict[TaskType, tuple[str, ...]]:
    if not isinstance(section, Mapping):
        problems.append(f"{where}.task_types: must be a mapping of {', '.join(TaskType)}")
        return {}
    problems += [f"{where}.task_types.{one}: unknown" for one in sorted(map(str, set(section) - set(TaskType)))]
    chains = {}
    for task_type in TaskType:
        place = f"{where}.task_types.{task_type}"
        if task_type not in section:
            problems.append(f"{place}: must be set")
            continue
        chain = _texts(section, task_type, f"{where}.task_types", problems)
        for name in chain:
            model = models.get(name)
            if model is None:
                problems.append(f"{place}: {name!r} is not in the catalogue")
            elif "chat" not in model.abilities or (task_type is TaskType.VISION and "vision" not in model.abilities):
                problems.append(f"{place}: {name!r} can't do that")
        if len(chain) > MAX_CHAIN:
            problems.append(f"{place}: must have at most {MAX_CHAIN} models")
        if len(set(chain)) != len(chain):
            problems.append(f"{place}: names a model twice")
        if not chain or (len(chain) <= MIN_FALLBACKS and not waived):
            problems.append(
                f"{place}: must have at least {MIN_FALLBACKS} fallbacks after its first model, got {max(0, len(chain) - 1)}; "
                "add some, or say in `waive_fallbacks` why not"
            )
        chains[task_type] = chain
    return chains


def _times(section: object, problems: list[str]) -> dict[TaskType, TaskTimes]:
    times: dict[TaskType, TaskTimes] = {}
    if not isinstance(section, Mapping):
        problems.append(f"task_types: must be a mapping of {', '.join(TaskType)}")
        return times
    problems += [f"task_types.{one}: unknown" for one in sorted(map(str, set(section) - set(TaskType)))]
    for task_type in TaskType:
        where = f"task_types.{task_type}"
        value = section.get(task_type)
        if not isinstance(value, Mapping):
            problems.append(f"{where}: must have latency_target and attempt_timeout")
            continue
        problems += [f"{where}.{key}: unknown" for key in sorted(map(str, set(value) - {"latency_target", "attempt_timeout"}))]
        times[task_type] = TaskTimes(
            _seconds(value.get("latency_target"), f"{where}.latency_target", problems),
            _seconds(value.get("attempt_timeout"), f"{where}.attempt_timeout", problems),
        )
    return times


def _seconds(value: object, where: str, problems: list[str]) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    seconds = float(match[1]) * _SECONDS[match[2]] if match is not None else 0.0
    if not 0.001 <= seconds <= 3600:
        problems.append(f"{where}: must be a duration such as 500ms, 20s or 2m, at most 60m, got {value!r}")
    return seconds


def _texts(value: Mapping[Any, Any], key: str, where: str, problems: list[str]) -> tuple[str, ...]:
    found = value.get(key)
    if found is None:
        return ()
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(isinstance(one, str) for one in found):
        problems.append(f"{where}.{key}: must be a list of texts")
        return ()
    return tuple(found)


def _count(value: Mapping[Any, Any], key: str, minimum: int, where: str, problems: list[str]) -> int:
    found = value.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or not minimum <= found <= 1_000_000_000:
        problems.append(f"{where}.{key}: must be a whole number from {minimum} to 1000000000, got {found!r}")
        return minimum
    return found
