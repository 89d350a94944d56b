"""What a name leads to: flags go before folders, and what is not there is told with what is."""

from __future__ import annotations

import pytest
from support.folders import put_version, write_card

from camserve.server.errors import NotFound, Reason, Unsupported
from camserve.server.models.config import ModelConfig
from camserve.server.models.sources import ModelSource, scan_repository
from camserve.server.models.stock import Stock


@pytest.fixture
def stock(tmp_path):
    """The model `part` in versions 1 and 2 in a folder, and `given` by a flag."""
    for version in (1, 2):
        put_version(tmp_path, "part", version, best=version)
    write_card(tmp_path, "part", '[versions]\nlabels = {stable = "1"}')
    flag = ModelSource(name="given", version="1", path=tmp_path / "given.pt", config=ModelConfig())
    return Stock([*scan_repository(tmp_path), flag], root=tmp_path)


async def test_what_a_flag_gave_is_no_folders_affair(stock):
    """It is found without one, stays where it is, and is not followed."""
    (given,) = stock.given("given")

    assert given is await stock.source("given", "", served_as="1")
    assert await stock.has("given", "1")
    assert not stock.is_followed("given")
    assert stock.is_followed("part")
    assert [] == stock.given("part")


async def test_versions_and_labels_lead_to_sources(stock, tmp_path):
    """A label of the folder as it is now is as good as its version."""
    assert "2" == (await stock.source("part", "2", served_as="2")).version
    assert "1" == (await stock.source("part", "stable", served_as="1")).version

    write_card(tmp_path, "part", '[versions]\nlabels = {stable = "2"}')
    assert "2" == (await stock.source("part", "stable", served_as="1")).version


async def test_a_version_that_is_not_there_is_told_with_those_that_are(stock):
    """With the field that was wrong."""
    with pytest.raises(NotFound, match="no version '7' of model 'part'; it has: 1, 2") as caught:
        await stock.source("part", "7", served_as="7")

    assert (Reason.VERSION_NOT_FOUND, "version") == (caught.value.reason, caught.value.field)


@pytest.mark.parametrize("name", ["board", "../part", "part/1", ".", "", "/etc"])
async def test_names_lead_nowhere_else(stock, name):
    """What is no name of a model in the folder is not there, whatever lies at that path."""
    with pytest.raises(NotFound, match="the repository has no model") as caught:
        await stock.folder(name)

    assert Reason.MODEL_NOT_FOUND is caught.value.reason


async def test_a_folder_is_read_anew_each_time(stock, tmp_path):
    """What came, changed or went since is seen; a card that cannot be read is told."""
    put_version(tmp_path, "part", 3, best=3)
    assert {"1", "2", "3"} == set((await stock.folder("part")).sources)

    (tmp_path / "part" / "3" / "model.pt").unlink()
    (tmp_path / "part" / "3").rmdir()
    assert not await stock.has("part", "3")
    assert await stock.has("part", "2")

    (tmp_path / "part" / "model.toml").write_text("[input", encoding="utf-8")
    with pytest.raises(Unsupported, match=r"model\.toml") as caught:
        await stock.folder("part")
    assert Reason.MODEL_LOAD_FAILED is caught.value.reason


async def test_without_a_repository_there_is_what_was_given(tmp_path):
    """Also a version that lay in a folder, which nobody told the server to follow."""
    put_version(tmp_path, "part", 1, best=1)
    stock = Stock(list(scan_repository(tmp_path)), root=None)

    assert ["1"] == [source.version for source in stock.given("part")]
    assert not stock.is_followed("part")
    assert not await stock.has("part", "2")
    with pytest.raises(
        Unsupported, match=r"no model repository .* started with: part; start it with --models"
    ) as caught:
        await stock.folder("board")
    assert Reason.REPOSITORY_MISSING is caught.value.reason
