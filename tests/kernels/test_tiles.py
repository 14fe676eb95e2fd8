"""The shipped tables of tiles, and the choice from them."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import choice
from bra_triton.kernels.tiles import table as tile_table
from bra_triton.kernels.tiles.table import BITS, FORMS, HEAD_DIMS, KERNELS, SIZES, Entry, Key, Table, Tile

CPU = torch.device("cpu")
ARCHS = tile_table.packaged_archs()
ALL_KEYS = [Key(*parts) for parts in itertools.product(KERNELS, BITS, HEAD_DIMS, SIZES, FORMS)]
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def test_the_architectures_that_the_package_has_tables_of():
    assert set(ARCHS) == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_table_is_whole_and_in_order(arch):
    table = tile_table.packaged(arch)
    assert list(table.entries) == ALL_KEYS
    assert table.arch == arch
    assert table.origin in {"predicted", "default"}
    assert table.torch
    assert table.triton


@pytest.mark.parametrize("arch", ARCHS)
@given(
    kernel=st.sampled_from(KERNELS),
    dtype=DTYPES,
    head_dim=st.integers(1, 256),
    tokens=st.integers(1, 6035),
    form=st.sampled_from(FORMS),
)
def test_every_problem_has_a_tile_that_wastes_less_than_half_of_it(
    arch, kernel, dtype, head_dim, tokens, form
):
    with tiles.use_architecture(arch):
        tile = tiles.choose(kernel, dtype, head_dim, tokens, CPU, form)
    rows = -(-tokens // tile.own) * tile.own
    assert tile.own == 16 or rows < 2 * tokens


def test_a_tile_says_what_it_is():
    assert str(Tile(64, 32, 4, 2)) == "64x32 4w 2s"
    assert str(Tile(64, 64, 4, 5, exp_share=8, fuses_lepe=False)) == "64x64 4w 5s 1/8 exp lepe apart"


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("gfx")])
def test_amd_gets_one_stage(arch):
    # Its compute units have 64 KiB of shared memory, too little for a second stage of wide heads.
    assert {entry.tile.num_stages for entry in tile_table.packaged(arch).entries.values()} == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"own": 48}, {"step": 8}, {"num_warps": 3}, {"num_stages": 0}, {"own": 64.0}),
        *({"own": 512}, {"step": 2**40}, {"num_warps": 64}, {"num_stages": 9}),
        *({"exp_share": 1}, {"exp_share": 3}, {"exp_share": 16}, {"fuses_lepe": 1}),
    ],
)
def test_a_tile_is_made_of_powers_of_two(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(Tile(64, 64, 4, 3), **wrong)


@pytest.mark.parametrize(
    "wrong", [{"kernel": "sideways"}, {"bits": 8}, {"head_dim": 48}, {"size": 100}, {"form": "round"}]
)
def test_a_key_names_what_it_does_not_know(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
        replace(ALL_KEYS[0], **wrong)


@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (6035, 128)])
def test_size_classes(tokens, size):
    assert Key.of(tiles.FORWARD, 16, 33, tokens) == Key(tiles.FORWARD, 16, 64, size)


def test_a_head_too_wide_is_named():
    with pytest.raises(ValueError, match="head_dim must be one of 16, 32, 64, 128, 256, got 257"):
        tiles.choose(tiles.FORWARD, torch.float16, 257, 100, CPU)


@pytest.mark.parametrize(
    ("arch", "served_by"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_75", "sm_80"),
        ("gfx90a", "gfx942"),
    ],
)
def test_an_architecture_without_a_table_gets_its_nearest_elders(arch, served_by):
    assert tile_table.nearest(arch, ARCHS) == served_by


def test_the_architecture_of_an_amd_gpu_is_named_without_its_features(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tiles.architecture_of(torch.device("cuda", 0)) == "gfx942"


def test_only_architectures_have_tables():
    with (
        pytest.raises(ValueError, match="arch must be like sm_90 or gfx942, got 'H100'"),
        tiles.use_architecture("H100"),
    ):
        pass


def test_tensors_on_no_gpu_stand_for_the_architecture_asked_for(monkeypatch):
    tables = {
        arch: Table(arch, "predicted", "", "", dict.fromkeys(ALL_KEYS, Entry(Tile(16, 16, 1, stages))))
        for stages, arch in enumerate(("sm_80", "sm_90"), 1)
    }
    monkeypatch.setattr(choice, "packaged", lambda arch: tables[arch])
    choice._of_architecture.cache_clear()

    def stages():
        return tiles.choose(tiles.FORWARD, torch.float16, 32, 100, torch.device("meta")).num_stages

    try:
        assert stages() == 2
        with tiles.use_architecture("sm_80"):
            assert stages() == 1
        assert stages() == 2
    finally:
        choice._of_architecture.cache_clear()


def test_forced_tiles_are_of_the_kernels_named_alone():
    forced = Tile(16, 16, 1, 7)
    with tiles.use_tiles({tiles.FORWARD: forced}):
        assert tiles.choose(tiles.FORWARD, torch.float16, 32, 100, CPU) == forced
        assert tiles.choose(tiles.QUERY_GRADIENT, torch.float16, 32, 100, CPU) != forced
    assert tiles.choose(tiles.FORWARD, torch.float16, 32, 100, CPU) != forced


def test_a_table_survives_its_file():
    plain, special = Tile(16, 32, 1, 2), Tile(16, 32, 1, 2, exp_share=4, fuses_lepe=False)
    entries = dict(zip(ALL_KEYS, (Entry(plain, 1.5), Entry(special, 1.5), Entry(plain)), strict=False))
    table = Table("sm_90", "predicted", "2.13.0", "3.8.0", entries)
    text = tile_table.format_table(table)
    assert tile_table.parse_table(text) == table
    rows = [line for line in text.splitlines() if '"own"' in line]
    assert len(rows) == 3
    assert '"options": {}' in rows[0]
    assert '"options": {"exp_share": 4, "fuses_lepe": false}' in rows[1]


def test_float32_takes_no_inexact_exponentials():
    row = tile_table.entry_row(Key(tiles.FORWARD, 32, 32, 128), Entry(Tile(64, 64, 4, 2, exp_share=8)))
    with pytest.raises(ValueError, match="exp_share must be 0 with 32 bits"):
        tile_table.parse_entry(row)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"options": {"colour": 1}}, "has the unknown option 'colour', not one of exp_share, fuses_lepe: "),
        ({"options": {"own": 16}}, "has the unknown option 'own'"),
        ({"options": {"exp_share": 5}}, "is impossible: exp_share must be a power of two"),
        ({"options": {"fuses_lepe": "no"}}, "is impossible: fuses_lepe must be a bool, got 'no'"),
        ({"options": ["exp_share"]}, "must have a 'options' of type dict, got \\['exp_share'\\]"),
        ({"cost": 10**400}, "has an impossible cost: int too large"),
        ({"own": 48}, "is impossible: own must be a power of two from 16 to 256, got 48"),
        ({"num_warps": "4"}, "must have a 'num_warps' of type int, got '4'"),
        ({"bits": True}, "must have a 'bits' of type int, got True"),
        ({"size": 100}, "is impossible: size must be one of 16, 32, 64, 128, got 100"),
        ({"cost": "0.5"}, "must have a 'cost' of type float or int or NoneType, got '0.5'"),
        ({"measured_on": None}, "must have a 'measured_on' of type str, got None"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(wrong, message):
    row = tile_table.entry_row(ALL_KEYS[0], Entry(Tile(16, 32, 1, 2)))
    with pytest.raises(ValueError, match=f"^a tile's entry {message}"):
        tile_table.parse_entry(row | wrong)


FIELDS = tile_table.entry_row(ALL_KEYS[0], Entry(Tile(16, 32, 1, 2)))


@pytest.mark.parametrize("missing", FIELDS)
def test_the_field_that_an_entry_lacks_is_named(missing):
    row = {name: value for name, value in FIELDS.items() if name != missing}
    with pytest.raises(ValueError, match=f"^a tile's entry lacks the field '{missing}': "):
        tile_table.parse_entry(json.loads(json.dumps(row)))


@pytest.mark.parametrize("row", [5, None, [], "own"])
def test_an_entry_is_an_object(row):
    with pytest.raises(ValueError, match=r"^a tile's entry must be a JSON object, got "):
        tile_table.parse_entry(row)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arch": None}, "must have a 'arch' of type str, got None"),
        ({"entries": {}}, "must have a 'entries' of type list, got {}"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(wrong, message):
    content = {"arch": "sm_90", "origin": "default", "torch": "", "triton": "", "entries": []}
    with pytest.raises(ValueError, match=f"^a table of tiles {message}"):
        tile_table.parse_table(json.dumps(content | wrong))
    del content[next(iter(wrong))]
    with pytest.raises(ValueError, match=f"^a table of tiles lacks the field '{next(iter(wrong))}': "):
        tile_table.parse_table(json.dumps(content))
    with pytest.raises(ValueError, match=r"^a table of tiles must be a JSON object, got \[\]"):
        tile_table.parse_table("[]")


@pytest.mark.parametrize(("head_dim", "block"), [(1, 16), (5, 16), (16, 16), (24, 32), (33, 64), (256, 256)])
def test_channel_block(head_dim, block):
    assert tiles.channel_block(head_dim) == block
