"""`rlhf plugins`: what is installed, and what is wrong with the rest."""

from __future__ import annotations

import difflib
import json
from typing import Any

import attrs
import cattrs
import click

from rlhf.cli import say
from rlhf.entries import KINDS, address
from rlhf.errors import Problem, RequestError
from rlhf.options import default_of, fields, info, type_name
from rlhf.registry import Offer, Registry, loaded, status_of


@click.group(invoke_without_command=True)
@click.option("--kind", type=click.Choice(list(KINDS)), help="only this kind")
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
@click.pass_context
def plugins(ctx: click.Context, kind: str | None, as_json: bool) -> None:
    """List every component of every installed plugin, with its distribution and whether it can be used."""
    if ctx.invoked_subcommand is not None:
        return
    registry = loaded()
    offers = [offer for offer in registry.offers if kind in (None, offer.kind)]
    if as_json:
        click.echo(json.dumps(status_of(offers), indent=1))
        return
    width = max((len(offer.name) for offer in offers), default=0)
    for name in [*KINDS, ""]:
        members = sorted((o for o in offers if o.kind == name), key=lambda o: o.name)
        if members:
            click.echo(f"{name or 'failed plugins'}")
        for offer in members:
            state = "" if offer.status == "ok" else f"  [{offer.status}: {offer.reason}]"
            click.echo(
                f"  {offer.name:<{width}}  {offer.summary or '-'}  ({offer.distribution} {offer.version}){state}"
            )
    _warn(registry)


@plugins.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
def show(name: str, as_json: bool) -> None:
    """Show one component: its options, what it provides, requires and excludes."""
    registry = loaded()
    offers = [offer for offer in registry.offers if offer.name == name]
    if not offers:
        names = sorted({offer.name for offer in registry.offers})
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.3)
        alike = f"the nearest: {', '.join(near)}" if near else f"there are {', '.join(names)}"
        raise RequestError(Problem(f"no component is called {name!r}", f"{alike}; rlhf plugins lists all"))
    if as_json:
        rows = [{**row, **_details(offer)} for row, offer in zip(status_of(offers), offers, strict=True)]
        click.echo(json.dumps(rows, indent=1))
        return
    for offer in offers:
        click.echo(_page(offer))


def _details(offer: Offer) -> dict[str, Any]:
    """What `show --json` tells beyond the listing."""
    entry = offer.entry
    if entry is None or offer.status == "failed":  # what is ill-made can't be read
        return {}
    return {
        "provides": sorted(entry.provides),
        "requires": sorted(entry.requires),
        "conflicts": sorted(entry.conflicts),
        "options": [_option(field) for field in fields(entry.config).values()] if entry.config else [],
    }


def _option(field: attrs.Attribute[Any]) -> dict[str, Any]:
    about, default = info(field), default_of(field)
    return {
        "name": field.name,
        "type": type_name(field.type),
        "required": default is attrs.NOTHING,
        "default": None if default is attrs.NOTHING else cattrs.unstructure(default),
        "choices": list(about.choices),
        "help": about.help,
        "unit": about.unit,
        "source": about.source,
    }


def _page(offer: Offer) -> str:
    from rlhf.cli.recipes import option_rows  # the composer comes with it, of which a listing has no need

    lines = [
        f"--{offer.kind} {offer.name}: {offer.summary}",
        f"  from {offer.distribution} {offer.version}, {offer.status}",
    ]
    if offer.reason:
        lines.append(f"  {offer.reason}")
    entry = offer.entry
    if entry is None or offer.status == "failed":
        return "\n".join(lines)
    for title, names in (("provides", entry.provides), ("requires", entry.requires), ("excludes", entry.conflicts)):
        if names:
            lines.append(f"  {title} {', '.join(sorted(names))}")
    rows = option_rows(entry, f"--{address(offer.kind, offer.name)}.")
    lines += [f"  {flag}\n      {text}" for flag, text in rows]
    return "\n".join(lines)


def _warn(registry: Registry) -> None:
    for warning in registry.warnings:
        say(f"warning: {warning}")
