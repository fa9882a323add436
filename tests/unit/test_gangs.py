"""What fits on the machines of a cluster, against filling them one slot at a time."""

from __future__ import annotations

from random import Random

import pytest

from icrf.gangs import RAY_UNITS, cpu_share, shortages, slots_that_fit
from icrf.protocol import Capacity, Resources

TWO_BY_TWO = (Resources(2.0), Resources(2.0))
MIXED = (Resources(4.0, 1.0), Resources(2.0, 0.0))


@pytest.mark.parametrize(
    ("machines", "each", "strategy", "expected"),
    [
        (TWO_BY_TWO, Resources(1.0), "PACK", 4),
        (TWO_BY_TWO, Resources(1.0), "STRICT_PACK", 2),
        (TWO_BY_TWO, Resources(1.0), "STRICT_SPREAD", 2),
        (TWO_BY_TWO, Resources(1.5), "SPREAD", 2),
        (TWO_BY_TWO, Resources(0.2), "PACK", 20),
        (MIXED, Resources(1.0, 0.25), "PACK", 4),
        (MIXED, Resources(1.0, 0.25), "STRICT_SPREAD", 1),
        (MIXED, Resources(3.0), "STRICT_PACK", 1),
        (TWO_BY_TWO, Resources(3.0), "PACK", 0),
    ],
)
def test_slots_are_counted_machine_by_machine(
    machines: tuple[Resources, ...], each: Resources, strategy: str, expected: int
) -> None:
    assert slots_that_fit(machines, each, strategy) == expected
    assert shortages(expected, each, machines, strategy) == []
    assert len(shortages(expected + 1, each, machines, strategy)) == 1


def test_filling_machines_by_hand_leads_to_the_same_number() -> None:
    draw = Random(1)
    for _ in range(200):
        machines = [Resources(draw.randint(0, 80) / 10, draw.randint(0, 4)) for _ in range(draw.randint(1, 5))]
        each = Resources(draw.randint(1, 30) / 10, draw.choice([0.0, 0.25, 0.5, 1.0]))
        found = 0
        for machine in machines:
            cpus, gpus = machine.num_cpus, machine.num_gpus
            while cpus - each.num_cpus > -1e-9 and gpus - each.num_gpus > -1e-9:
                cpus, gpus, found = cpus - each.num_cpus, gpus - each.num_gpus, found + 1
        assert slots_that_fit(machines, each, "PACK") == found


def test_an_equal_share_is_the_largest_with_which_all_slots_fit() -> None:
    draw = Random(2)
    for _ in range(200):
        machines = [Resources(draw.randint(1, 80) / 10) for _ in range(draw.randint(1, 5))]
        slots = draw.randint(1, 40)
        share = cpu_share(machines, slots)
        assert slots_that_fit(machines, Resources(share), "PACK") >= slots
        more = share + 1 / RAY_UNITS
        assert share == 1.0 or slots_that_fit(machines, Resources(more), "PACK") < slots


def test_what_is_lacking_is_said_with_numbers() -> None:
    (sum_lacks,) = shortages(3, Resources(2.0), TWO_BY_TWO, "PACK")
    assert sum_lacks == "3 slots x 2 CPU = 6 CPU needed, 4 CPU in total"
    (machine_lacks,) = shortages(3, Resources(1.0, 0.25), MIXED, "STRICT_SPREAD")
    assert machine_lacks == (
        "STRICT_SPREAD needs 3 slots of 1 CPU, 0.25 GPU on a Ray node each, 1 fit; 2 Ray nodes in total, "
        "the largest has 4 CPU, 1 GPU"
    )


def test_a_cluster_that_does_not_list_its_machines_is_one() -> None:
    assert Capacity(2, 4.0, 1.0, 0).machines == (Resources(4.0, 1.0),)
    assert Capacity(8, 4.0, 1.0, 0, quota=3).most_slots == 3
