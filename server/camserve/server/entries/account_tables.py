"""Accounts of checked models for people and for programs; `check_command.py` prints them on standard output."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from camserve.client.cards import ModelCard, card_from_proto
from camserve.client.tables import show_card
from camserve.server.entries.check import Account
from camserve.server.entries.trial import PassTrial
from camserve.server.wire.answers import card_message

__all__ = ["as_json", "show_account"]


def as_json(account: Account) -> dict[str, Any]:
    """One account; the card is as `camserve models NAME --json` prints it."""
    card = _client_card(account)
    return {
        "name": account.name,
        "version": account.version,
        "works": not account.error,
        "error": account.error,
        "card": None if card is None else dataclasses.asdict(card),
        "passes": [dataclasses.asdict(trial) for trial in account.passes],
    }


def show_account(account: Account) -> None:
    """Prints the card and what passes took, or why there is no card."""
    console = Console()
    card = _client_card(account)
    if card is None:
        version = f", version {account.version}" if account.version else ""
        console.print(f"[red]{escape(account.name)}{escape(version)}, cannot be served:[/] {escape(account.error)}")
        return
    show_card(card)
    passes = Table(title="One pass")
    for heading in ("rows", "explained by", "time", "memory at its height"):
        passes.add_column(heading)
    for trial in account.passes:
        passes.add_row(str(trial.rows), trial.method or "-", f"{trial.seconds * 1e3:.1f} ms", _size(trial))
    console.print(passes)


def _client_card(account: Account) -> ModelCard | None:
    """The card as it would reach a client: over the wire's messages, so that both commands say the same."""
    return None if account.card is None else card_from_proto(card_message(account.card))


def _size(trial: PassTrial) -> str:
    return "not known here" if trial.peak_bytes is None else f"{trial.peak_bytes / (1 << 20):.1f} MiB"
