"""AttentionReport × rules → SwapPlan: which layers are swapped, for which mixer, and which stay."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.table import Table

from fla_swap.errors import MixerError, PlanError
from fla_swap.mixers import MIXERS, MixerConfig, TokenMixer, mixer_class
from fla_swap.mixers.same import SAME, same_options
from fla_swap.types import AttentionReport, AttentionSite, LayerPlan, SwapPlan, from_jsonable, to_jsonable

Keep = str | float | Fraction | Sequence[int]
MixerChoice = str | MixerConfig

WINDOWED = ("window", "chunked", "local")
PLAN_FORMAT = "fla_swap.plan"


@dataclass(frozen=True)
class Rule:
    """Swap every site whose fqn matches `pattern` (shell style: `*`, `?`, `[…]`) for `mixer`; the first match wins.

    `mixer`: a name, or the mixer's config (`fs.mixers.WindowConfig(window=512)`).
    """

    pattern: str
    mixer: MixerChoice


def plan(
    report: AttentionReport,
    *,
    mixer: MixerChoice | None = None,
    options: Mapping[str, Any] | None = None,
    keep: Keep = "1/4",
    rules: Sequence[Rule] | None = None,
    local: bool = False,
) -> SwapPlan:
    """Choose what happens to every attention site of `report`.

    Args:
        report: what `inspect` found.
        mixer: the mixer of every swapped layer that no rule names. A name, or a config with options. "same" is for the
            layers that are linear already (`report.linear`): each is swapped for the mixer that computes exactly what
            it computes, softmax attention stays. Other mixers leave those layers as they are.
        options: options of `mixer` when it is given by name.
        keep: layers that stay as they are, among those that `mixer` would take: a fraction ("1/4", 0.25; spread
            uniformly, see `uniform_layers`), a sequence of layer numbers, or 0 for none.
        rules: exceptions by name; a site that a rule matches is swapped, whatever `keep` says. Without `mixer`, the
            sites that no rule matches stay. Cross-attention always stays.
        local: also swap the layers that are windowed already; else they stay, and the fraction does not count them.
    Raises:
        PlanError: a rule matches nothing, a layer does not exist, nothing is swapped, a mixer cannot take a site.
    """
    if mixer is None and not rules:
        raise PlanError(f"a plan needs `mixer` or `rules`; the mixers are {[m.name for m in MIXERS]}")
    if mixer is None and options is not None:
        raise PlanError("`options` belong to `mixer`, which is not given; a rule takes a mixer's config instead")
    if not (report.sites or report.linear):
        raise PlanError(f"the report of {report.model} holds no attention site: nothing to plan")
    same, rules = _same_sites(report, mixer, options, rules or ())
    if mixer == SAME:
        mixer, options = None, None
    open_sites = [s for s in report.sites if s.kind == "self" and (local or s.mask.kind not in WINDOWED)]
    chosen = _sites_of_rules(report.sites, open_sites, rules)
    if mixer is not None:
        free = [s for s in open_sites if s.fqn not in chosen]
        kept = _kept_layers(keep, free, report.sites)
        chosen |= {s.fqn: (mixer, options) for s in free if s.layer not in kept}
    if not (chosen or same):
        raise PlanError(_nothing_to_swap(report.sites, open_sites, keep))
    layers = tuple(_layer_plan(s, *chosen[s.fqn]) for s in report.sites if s.fqn in chosen)
    layers += tuple(_same_plan(s) for s in same)
    return SwapPlan(layers=layers, kept=tuple(s.fqn for s in report.sites if s.fqn not in chosen))


def _same_sites(
    report: AttentionReport, mixer: MixerChoice | None, options: Mapping[str, Any] | None, rules: Sequence[Rule]
) -> tuple[list[AttentionSite], list[Rule]]:
    """The linear layers that are swapped for what they compute, and the rules that are about others."""
    if mixer == SAME and options is not None:
        raise PlanError(f"mixer={SAME!r} takes no options: the layers say what they compute")
    if mixer == SAME and not report.linear:
        raise PlanError(f"mixer={SAME!r}: {report.model} has no layer that is linear already and was understood")
    chosen = {s.fqn for s in report.linear} if mixer == SAME else set()
    for rule in rules:
        if rule.mixer == SAME:
            matched = {s.fqn for s in report.linear if fnmatchcase(s.fqn, rule.pattern)}
            if not matched:
                known = [s.fqn for s in report.linear]
                raise PlanError(f"rule {rule.pattern!r} matches no layer that is linear already; those are {known}")
            chosen |= matched
    return [s for s in report.linear if s.fqn in chosen], [r for r in rules if r.mixer != SAME]


def _same_plan(site: AttentionSite) -> LayerPlan:
    try:
        options = same_options(site)
        mixer = site.recurrence.mixer if site.recurrence is not None else ""
        config = mixer_class(mixer).config_for(site, options)
    except MixerError as error:
        raise PlanError(f"{site.fqn} cannot be swapped for what it computes: {error}") from error
    return LayerPlan(site=site, mixer=mixer, options=json.loads(json.dumps(config.to_options())))


def uniform_layers(count: int, keep: int) -> tuple[int, ...]:
    """`keep` of `count` positions, evenly spaced, first and last included; a single one is taken from the middle.

    12 layers keep 3: 0, 6, 11. 8 keep 2: 0, 7. Fewer than two cannot include both ends.
    """
    if not 0 <= keep <= count:
        raise PlanError(f"cannot keep {keep} of {count} layers")
    if keep == 0:
        return ()
    if keep == 1:
        return (count // 2,)
    return tuple(math.floor(i * (count - 1) / (keep - 1) + 0.5) for i in range(keep))


def plan_to_json(plan: SwapPlan) -> str:
    """A plan as JSON text; `plan_from_json` reads it back, equal."""
    return json.dumps({"format": PLAN_FORMAT, **to_jsonable(plan)}, indent=2)


def plan_from_json(text: str) -> SwapPlan:
    """Read `plan_to_json`'s text. PlanError when it is no JSON, no plan, or of a version that is not known here."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"this is not JSON ({error}); a plan is written by `fla-swap plan` or `plan_to_json`"
        ) from error
    if not isinstance(data, dict) or data.pop("format", None) != PLAN_FORMAT:
        raise PlanError(f'this JSON is no fla_swap plan: it does not say "format": "{PLAN_FORMAT}"')
    return plan_from_dict(data)


def plan_from_dict(data: Mapping[str, Any]) -> SwapPlan:
    """Rebuild a plan from `to_jsonable(plan)`, as it stands in a saved model's config."""
    version = data.get("version")
    if version != SwapPlan.__dataclass_fields__["version"].default:
        raise PlanError(f"the plan has version {version!r}, this fla_swap reads version 1: update fla_swap")
    try:
        found = from_jsonable(SwapPlan, data)
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"the plan is damaged: {error}") from error
    for layer in found.layers:
        _mixer_class(layer.mixer)
    return found


def save_plan(plan: SwapPlan, path: str | Path) -> None:
    """Write a plan to a JSON file."""
    Path(path).write_text(plan_to_json(plan) + "\n", encoding="utf-8")


def load_plan(path: str | Path) -> SwapPlan:
    """Read a plan from a JSON file; the PlanError names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}") from error
    try:
        return plan_from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def plan_table(plan: SwapPlan) -> Table:
    """The plan as a table for a Rich console: one row a layer, swapped ones with their mixer and its main options."""
    table = Table(title=f"{len(plan.layers)} layers swapped, {len(plan.kept)} kept")
    for heading in ("layer", "module", "heads", "mask", "mixer"):
        table.add_column(heading, justify="right" if heading == "layer" else "left")
    rows = {fqn: ("", fqn, "", "", "[dim]kept[/dim]") for fqn in plan.kept}
    for layer in plan.layers:
        site = layer.site
        heads = f"{site.heads}/{site.kv_heads} × {site.head_dim}"
        mask = site.mask.kind + (f" {site.mask.window}" if site.mask.window else "")
        mask = site.kind if site.recurrence is not None else mask
        rows[site.fqn] = (str(site.layer), site.fqn, heads, mask, layer.mixer)
    for fqn in sorted(rows, key=_by_number):
        table.add_row(*rows[fqn])
    return table


def _by_number(fqn: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in fqn.split(".")]


def _sites_of_rules(
    sites: Sequence[AttentionSite], open_sites: Sequence[AttentionSite], rules: Sequence[Rule]
) -> dict[str, tuple[MixerChoice, None]]:
    chosen: dict[str, tuple[MixerChoice, None]] = {}
    for rule in rules:
        matched = [s for s in sites if fnmatchcase(s.fqn, rule.pattern)]
        if not matched:
            raise PlanError(f"rule {rule.pattern!r} matches no attention site; the sites are {[s.fqn for s in sites]}")
        if all(s.kind != "self" for s in matched):
            raise PlanError(
                f"rule {rule.pattern!r} matches only cross-attention ({[s.fqn for s in matched]}): its keys and values "
                "come from another sequence, so that there is no state to keep, and no mixer replaces it"
            )
        if not any(s in open_sites for s in matched):
            raise PlanError(
                f"rule {rule.pattern!r} matches only layers that are windowed already ({[s.fqn for s in matched]}); "
                "they stay unless local=True"
            )
        for site in matched:
            if site in open_sites:
                chosen.setdefault(site.fqn, (rule.mixer, None))
    return chosen


def _kept_layers(keep: Keep, free: Sequence[AttentionSite], sites: Sequence[AttentionSite]) -> set[int]:
    """The numbers of the layers that stay: those that are named, or a uniform share of the free ones."""
    if isinstance(keep, str) and "," in keep:
        keep = [_layer_number(piece) for piece in keep.split(",") if piece.strip()]
    if isinstance(keep, (str, int, float, Fraction)):
        share = _fraction(keep)
        wanted = math.floor(share * len(free) + Fraction(1, 2))
        if share:
            wanted = min(max(wanted, 1), len(free) - 1)
        return {free[i].layer for i in uniform_layers(len(free), wanted)} if free else set()
    known = [s.layer for s in sites]
    absent = sorted(set(keep) - set(known))
    if absent:
        raise PlanError(f"keep names layers {absent}, which do not exist; the attention layers are {known}")
    return set(keep)


def _layer_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise PlanError(f"keep: {text.strip()!r} is no layer number") from error


def _fraction(keep: str | float | Fraction) -> Fraction:
    try:
        percent = isinstance(keep, str) and keep.strip().endswith("%")
        share = Fraction(keep.strip().removesuffix("%")) if isinstance(keep, str) else Fraction(keep)
        share = share / 100 if percent else share
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise PlanError(f'keep={keep!r} is neither a fraction ("1/4", 0.25), nor layer numbers, nor 0') from error
    if not 0 <= share < 1:
        raise PlanError(f"keep={keep!r} must be at least 0 and less than 1; to keep certain layers, give their numbers")
    return share


def _nothing_to_swap(sites: Sequence[AttentionSite], open_sites: Sequence[AttentionSite], keep: Keep) -> str:
    if all(s.kind != "self" for s in sites):
        return f"all {len(sites)} attention layers are cross-attention, which no mixer replaces"
    if not open_sites:
        return f"all {len(sites)} attention layers are windowed already; local=True swaps them too"
    return f"the plan swaps no layer: keep={keep!r} keeps all of {[s.layer for s in open_sites]}"


def _layer_plan(site: AttentionSite, mixer: MixerChoice, options: Mapping[str, Any] | None) -> LayerPlan:
    """Completes the mixer's config from the site now, so that a bad choice fails here and a plan says everything."""
    kind = _mixer_class(mixer) if isinstance(mixer, str) else _class_of_config(mixer)
    if not isinstance(mixer, str) and options is not None:
        raise PlanError(f"give options inside {type(mixer).__name__}, or name the mixer and pass `options`; not both")
    try:
        config = kind.config_for(site, options if isinstance(mixer, str) else mixer)
        if config.rope == site.rope:
            config = dataclasses.replace(config, rope=None)
    except (MixerError, TypeError, ValueError) as error:
        raise PlanError(f"{site.fqn} cannot be swapped for {kind.name!r}: {error}") from error
    return LayerPlan(site=site, mixer=kind.name, options=json.loads(json.dumps(config.to_options())))


def _mixer_class(name: str) -> type[TokenMixer]:
    try:
        return mixer_class(name)
    except MixerError as error:
        raise PlanError(str(error)) from error


def _class_of_config(config: MixerConfig) -> type[TokenMixer]:
    for kind in MIXERS:
        if kind.config_class is type(config):
            return kind
    raise PlanError(f"{type(config).__name__} is the config of no mixer; the mixers are {[m.name for m in MIXERS]}")
