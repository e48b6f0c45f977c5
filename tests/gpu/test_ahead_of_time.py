"""Every kernel at its real configurations, compiled for GPUs that are not here: no spills, tensor cores, limits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"
)

#: kernel -> the most registers a thread and the most shared memory a program may take, at any configuration.
LIMITS = {
    "embedding_bag_fwd_kernel": (96, 8),
    "embedding_bad_kernel": (32, 1),
    "embedding_rows_kernel": (64, 1),
    "embedding_count_kernel": (64, 1),
    "embedding_pieces_kernel": (144, 9),
    "embedding_segments_kernel": (96, 1),
    "embedding_stitch_kernel": (96, 3),
    "tiny_tables_kernel": (144, 6),
    "tiny_tables_sum_kernel": (64, 1),
    "table_rows_kernel": (128, 3),
    "advance_kernel": (64, 1),
    "note_losses_kernel": (48, 1),
    "cut_rows_kernel": (96, 1),
    "expert_gate_pieces_kernel": (80, 33),
    "expert_gate_back_kernel": (168, 33),
    "dense_numbers_kernel": (48, 1),
    "dense_step_kernel": (128, 1),
    "operands_kernel": (48, 1),
    "expert_gate_dz_kernel": (144, 8),
    "expert_gate_mixed_dz_kernel": (144, 1),
    "expert_gate_wgrad_kernel": (176, 97),
    "expert_gate_statistics_kernel": (128, 1),
    "expert_gate_mix_kernel": (128, 1),
    "expert_gate_rows_kernel": (255, 1),
    "expert_gate_tail_kernel": (176, 5),
    "expert_gate_softmax_kernel": (128, 1),
    "expert_gate_sums_kernel": (128, 1),
    "expert_gate_folded_kernel": (255, 225),
    "linear_heads_fwd_kernel": (255, 1),
    "linear_heads_dx_kernel": (128, 8),
    "linear_heads_dw_kernel": (255, 8),
    "task_counts_kernel": (64, 1),
    "task_losses_kernel": (64, 1),
    "task_losses_sum_kernel": (32, 1),
}
#: Kernels that multiply; the other products of training are the library's.
PRODUCTS = ("expert_gate_folded_kernel", "expert_gate_wgrad_kernel")
#: The instruction of the architecture's fastest path.
BEST = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def reports():
    """One row for each kernel, configuration and architecture. Two processes: compiling takes a core each."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = [sys.executable, str(Path(__file__).parent / "ahead_of_time.py"), "--arch"]
    processes = [
        subprocess.Popen(
            [*program, *arches], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for arches in (["90"], ["80", "100"])
    ]
    rows = []
    try:
        for process in processes:
            out, errors = process.communicate()
            assert process.returncode == 0, errors[-6000:]
            rows += json.loads(out)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return rows


def name(row) -> str:
    return f"{row['kernel']} sm_{row['arch']} ({row['workload']}; {row['constants']})"


def test_every_kernel_is_compiled_for_every_architecture(reports):
    for arch in (80, 90, 100):
        assert {row["kernel"] for row in reports if row["arch"] == arch} == set(LIMITS)


def test_no_register_is_spilled(reports):
    assert [f"{name(row)}: {row['spills']}" for row in reports if row["spills"]] == []


def test_registers_and_shared_memory(reports):
    over = []
    for row in reports:
        registers, shared = LIMITS[row["kernel"]]
        if row["registers"] > registers or row["shared"] > shared * 1024:
            over.append(f"{name(row)}: {row['registers']} registers, {row['shared']} bytes")
        assert row["registers"] * row["warps"] * 32 <= 65536
    assert over == []


def test_what_a_loop_computes_stays_in_the_loop(reports):
    """A loop's bound that was a maximum over what an outer loop carried became the outer loop's first round's."""
    assert [f"{name(row)}: {row['misplaced']}" for row in reports if row["misplaced"] > 0] == []


def test_updates_round_as_torch_does(reports):
    """No approximate quotient or square root but those that are corrected, nothing small taken for zero."""
    rows = [row for row in reports if row["kernel"] in ("table_rows_kernel", "dense_step_kernel")]
    assert len(rows) > 40
    assert [name(row) for row in rows if row["approximate"]] == []


def test_products_run_on_tensor_cores(reports):
    """In bf16 and tf32, by the architecture's fastest instruction unless a tile is too small for it."""
    slow = []
    for row in reports:
        if row["kernel"] not in PRODUCTS:
            continue
        constants = dict(part.split("=") for part in row["constants"].split(", "))
        if constants.get("DOT") == "ieee" and row["dtype"] == "fp32":
            continue
        small = min(int(constants["BLOCK_M"]), int(constants.get("BLOCK_N", 64))) < 64
        if row["matrix"] != BEST[row["arch"]] and not (small and row["matrix"]):
            slow.append(f"{name(row)}: {row['matrix'] or 'none'}")
    assert slow == []


def test_lookups_load_sixteen_bytes_at_a_time(reports):
    """A row of 16 numbers takes four lanes, one of 4 a lane: one load in the code, among some thirty of ids, of dense
    columns and of what is known of a bag."""
    rows = [row for row in reports if row["kernel"] == "embedding_bag_fwd_kernel"]
    assert {constant for row in rows for constant in row["constants"].split(", ") if "DIM" in constant} >= {
        "DIM=4",
        "DIM=16",
    }
    assert [f"{name(row)}: {row['wide']}" for row in rows if row["wide"] < 0.02] == []


def test_batches_are_cut_sixteen_bytes_at_a_time(reports):
    """Out of blocks whose rows are multiples of that: 8 and 4 numbers, not 23 and 2."""
    rows = [row for row in reports if row["kernel"] == "cut_rows_kernel"]
    assert len(rows) >= 6
    assert [f"{name(row)}: {row['wide']}" for row in rows if row["wide"] < 0.02] == []


def test_products_load_sixteen_bytes_at_a_time(reports):
    """At widths that are no multiple of anything too (aliexpress reads 319, census 139)."""
    narrow = [f"{name(row)}: {row['wide']}" for row in reports if row["kernel"] in PRODUCTS and row["wide"] < 0.04]
    assert narrow == []
