"""The ranking of tiles by instruction counts, which are made up here, and the table that is written."""

from collections import Counter
from dataclasses import replace

import pytest

from bra_triton.bench import autotune
from bra_triton.bench.machine_code.hardware import table_shared_bytes
from bra_triton.bench.machine_code.launches import arguments_of
from bra_triton.bench.machine_code.static_analysis import INSTRUCTION_CLASSES, Analysis, Usage
from bra_triton.bench.tuning import prediction
from bra_triton.bench.tuning.prediction import Job
from bra_triton.bench.tuning.search_space import candidates, serves
from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import table as tile_table
from bra_triton.kernels.tiles.table import Entry, Key, Tile


def code(loop, spills=0, shared=1024, rest=100, serialised=False, registers=100):
    """Made-up counts of a kernel: `loop` and `rest` are numbers of instructions."""
    mix = dict.fromkeys(INSTRUCTION_CLASSES, 0) | {"matrix": 1, "exp": 1}
    usage = Usage(registers, shared, 0, spills)
    loop, rest = (Counter(mix | {"fp32": n - 2}) for n in (loop, rest))
    return Analysis(loop, Counter(), Counter(), rest, serialised, 128, 64, 32, 0, 4, usage)


def job_of(key, tile):
    return Job(replace(key, size=tiles.SIZES[-1]), tile)


class TestRanking:
    KEY = Key(tiles.FORWARD, 16, 32, 128)
    TILES = [tile for tile in candidates(tiles.FORWARD, 16, 32) if serves(tile, 128)][:3]

    def job(self, tile):
        return job_of(self.KEY, tile)

    def best(self, codes):
        results = {self.job(self.TILES[index]): found for index, found in codes.items()}
        return [self.TILES.index(r.tile) for r in prediction.rank(self.KEY, "sm_90", results)]

    def test_cheapest_first(self):
        assert self.best({0: code(900), 1: code(700), 2: code(800)}) == [1, 2, 0]

    def test_warps_that_wait_for_few_others_cost_more_than_instructions(self):
        """With 255 registers a thread an SM holds 8 warps, with 128 registers 16."""
        assert self.best({0: code(700, registers=255), 1: code(800, registers=128)}) == [1, 0]

    def test_among_ties_the_cheapest_loop(self):
        assert self.best({0: code(900, rest=100), 1: code(890, rest=180)})[0] == 1

    def test_a_loop_that_waits_for_every_product_must_be_cheaper_by_a_margin(self):
        assert self.best({0: code(850, serialised=True), 1: code(900)}) == [1, 0]
        assert self.best({0: code(700, serialised=True), 1: code(900)}) == [0, 1]

    def test_what_spills_or_does_not_fit_or_compile_is_out(self):
        too_much = table_shared_bytes("sm_90") + 1
        codes = {0: code(500, spills=1), 1: code(500, shared=too_much), 2: RuntimeError("no")}
        assert self.best(codes) == []

    @pytest.mark.parametrize(("spills", "more"), [(0, 1), (1, 0)])
    def test_a_form_is_tried_in_batches_and_in_one_alone_where_the_plain_kernel_spills(self, spills, more):
        padded = replace(self.KEY, form=tiles.PADDED)
        known = {self.job(tile): code(900 + i, spills) for i, tile in enumerate(self.TILES)}
        first = prediction.jobs_of_forms([padded], "sm_90", known)
        assert [job.tile for job in first] == self.TILES[: prediction.FORM_BATCH]
        known |= {job: code(900, spills=1) for job in first}
        assert len(prediction.jobs_of_forms([padded], "sm_90", known)) == more

    def test_the_table_takes_the_best_and_keeps_how_lepe_is_computed(self, monkeypatch):
        """The table also keeps measured entries. If all tiles of an entry spill, it takes the cheapest, and
        the entry is listed as spilling."""
        apart = replace(self.TILES[2], fuses_lepe=False)
        measured = replace(self.KEY, head_dim=64)
        entries = {self.KEY: Entry(apart, 1.0), measured: Entry(apart, 1.0, "a card")}
        shipped = tile_table.Table("sm_90", "predicted", "", "", entries)
        monkeypatch.setattr(prediction, "packaged", lambda arch: shipped)
        results = {self.job(self.TILES[0]): code(900, spills=1), self.job(self.TILES[1]): code(800, spills=1)}
        results |= {job_of(measured, job.tile): found for job, found in results.items()}
        made, spilling = prediction.table([self.KEY, measured], "sm_90", results)
        assert made.entries[self.KEY].tile == replace(self.TILES[1], fuses_lepe=False)
        assert made.entries[measured] == entries[measured]
        assert spilling == [self.KEY, measured]


@pytest.mark.compiled
@pytest.mark.parametrize("form", tiles.FORMS)
def test_what_is_predicted_adds_to_lepes_gradient_as_launches_do(form):
    job = job_of(Key(tiles.KEY_VALUE_GRADIENT, 16, 32, 64, form), Tile(64, 64, 4, 3))
    assert arguments_of(prediction.launch_of(job))["ADDS_TO_VALUE"]


@pytest.mark.compiled
def test_a_prediction_writes_a_table(monkeypatch, tmp_path, capsys):
    tile = Tile(64, 32, 2, 3)
    monkeypatch.setattr(prediction, "candidates", lambda *args: [tile])
    argv = ["--arch", "sm_90", "--kernel", "forward", "--head-dim", "32", "--workers", "1"]
    argv += ["--output", str(tmp_path)]
    assert autotune.main(argv) == 0
    table = tile_table.parse_table((tmp_path / "sm_90.json").read_text())
    assert table.origin == "predicted"
    shipped = tile_table.packaged("sm_90").entries
    for key, entry in table.entries.items():
        asked = key.kernel == "forward" and (key.bits, key.head_dim) == (16, 32) and key.size in {64, 128}
        if asked and not shipped[key].measured_on:
            assert entry.tile == replace(tile, fuses_lepe=shipped[key].tile.fuses_lepe)
            assert 5 < entry.cost < 80
        else:
            assert entry == shipped[key]
    assert "every configuration spills" in capsys.readouterr().out
