"""Which of a model's versions serve, by the `[versions]` of its `model.toml`. Pure; `sources.py` asks."""

from __future__ import annotations

from collections.abc import Collection

from camserve.server.models.config import VersionsConfig

__all__ = ["version_order", "wanted_versions"]


def version_order(version: str) -> tuple[int, str]:
    """Sorts versions: numbers by value, after all names."""
    return (int(version), version) if version.isdecimal() else (-1, version)


def wanted_versions(present: Collection[str], config: VersionsConfig) -> tuple[str, ...]:
    """Those that serve, the newest last: what the policy takes, and what labels name.

    Args:
        present: every version that the repository holds of the model.
        config: what its `model.toml` says.

    Raises:
        ValueError: a version is listed or labelled that is not there, or a label is called like a version.
    """
    known = ", ".join(sorted(present, key=version_order)) or "none"
    for label, version in config.labels.items():
        if label in present:
            raise ValueError(f"versions.labels: {label!r} is the name of a version; call the label differently")
        if version not in present:
            raise ValueError(
                f"versions.labels: {label!r} names version {version!r}, which is not there; there are: {known}"
            )
    missing = [version for version in config.listed if version not in present]
    if missing:
        raise ValueError(f"versions.listed: {missing[0]!r} is not there; there are: {known}")
    by_age = sorted(present, key=version_order)
    taken = {"latest": by_age[-config.latest :], "all": by_age, "listed": config.listed}[config.policy]
    return tuple(version for version in by_age if version in taken or version in config.labels.values())
